"""Erlang/OTP's supervision on trio: start in order, restart by rule, stop in order by one deadline.

A library of its own: it imports trio and the standard library and nothing else of ullm, not even its logs.
docs/explanation/supervision.md shows it in a program that has nothing to do with language models.
"""

from ullm.supervision.actor import Mailbox, MailboxStatistics, Reply, ask, cleanup_scope
from ullm.supervision.errors import (
    ActorLost,
    AskTimeout,
    ChildConflict,
    ChildNotFound,
    InvalidSpec,
    MailboxClosed,
    MailboxFull,
    RestartLimitReached,
    StartFailed,
    SupervisionError,
    first_cause,
    root_cause,
)
from ullm.supervision.policy import AutoShutdown, Restart, Strategy, exponential_backoff
from ullm.supervision.shutdown import BRUTAL_KILL, INFINITY, ChildReport
from ullm.supervision.signals import (
    STOP_SIGNALS,
    Watchdog,
    forced_exit_code,
    leave_now,
    remember_signals,
    signal_ladder,
)
from ullm.supervision.spec import (
    IGNORE,
    ChildCounts,
    ChildInfo,
    ChildSpec,
    ChildStatus,
    Kind,
    Shutdown,
)
from ullm.supervision.state import ForwardState, StateCell, StateReader
from ullm.supervision.supervisor import Supervisor, open_supervisor, supervisor_child

__all__ = [
    "BRUTAL_KILL",
    "IGNORE",
    "INFINITY",
    "STOP_SIGNALS",
    "ActorLost",
    "AskTimeout",
    "AutoShutdown",
    "ChildConflict",
    "ChildCounts",
    "ChildInfo",
    "ChildNotFound",
    "ChildReport",
    "ChildSpec",
    "ChildStatus",
    "ForwardState",
    "InvalidSpec",
    "Kind",
    "Mailbox",
    "MailboxClosed",
    "MailboxFull",
    "MailboxStatistics",
    "Reply",
    "Restart",
    "RestartLimitReached",
    "Shutdown",
    "StartFailed",
    "StateCell",
    "StateReader",
    "Strategy",
    "SupervisionError",
    "Supervisor",
    "Watchdog",
    "ask",
    "cleanup_scope",
    "exponential_backoff",
    "first_cause",
    "forced_exit_code",
    "leave_now",
    "open_supervisor",
    "remember_signals",
    "root_cause",
    "signal_ladder",
    "supervisor_child",
]
