"""Erlang/OTP's supervision on trio: start in order, restart by rule, stop in order by one deadline.

Knows nothing of language models and imports nothing of the engine's; docs/supervision.md shows how
to embed it.
"""

from ullm.supervision.actor import cleanup_scope
from ullm.supervision.policy import AutoShutdown, Restart, Strategy, exponential_backoff
from ullm.supervision.shutdown import (
    BRUTAL_KILL,
    INFINITY,
    ChildReport,
    Deadline,
    ShutdownReport,
    StageReport,
    stages_of,
)
from ullm.supervision.signals import STOP_SIGNALS, Watchdog, forced_exit_code, leave_now, signal_ladder
from ullm.supervision.spec import (
    IGNORE,
    ChildCounts,
    ChildInfo,
    ChildSpec,
    ChildStatus,
    Kind,
    Shutdown,
)
from ullm.supervision.state import EngineState, StateCell, StateReader
from ullm.supervision.supervisor import Supervisor, open_supervisor

__all__ = [
    "BRUTAL_KILL",
    "IGNORE",
    "INFINITY",
    "STOP_SIGNALS",
    "AutoShutdown",
    "ChildCounts",
    "ChildInfo",
    "ChildReport",
    "ChildSpec",
    "ChildStatus",
    "Deadline",
    "EngineState",
    "Kind",
    "Restart",
    "Shutdown",
    "ShutdownReport",
    "StageReport",
    "StateCell",
    "StateReader",
    "Strategy",
    "Supervisor",
    "Watchdog",
    "cleanup_scope",
    "exponential_backoff",
    "forced_exit_code",
    "leave_now",
    "open_supervisor",
    "signal_ladder",
    "stages_of",
]
