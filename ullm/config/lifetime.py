"""How long things may take, what is started again, and when the engine sleeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ullm.config.options import MINUTES, option

MAX_SLEEP_LEVEL = 3
SleepMode = Literal["wait", "abort", "keep"]
"""How requests in flight are treated when the engine is put to sleep."""


@dataclass(frozen=True, kw_only=True)
class SupervisionConfig:
    """Stopping, restarting and watching."""

    shutdown_timeout: float = option(
        25.0, "Seconds from a request to stop until the process has ended; requests may finish in that time."
    )
    max_restarts: int = option(
        3, "Number of worker restarts within --restart-period after which the engine gives up."
    )
    restart_period: float = option(1 * MINUTES, "Seconds over which --max-restarts counts.")
    start_timeout: float = option(
        10 * MINUTES, "Seconds that a worker may take to load the model and warm up."
    )
    step_timeout: float = option(
        20.0, "Seconds without progress, not even a layer of the model, after which a worker counts as hung."
    )
    health_interval: float = option(5.0, "Seconds between round trips through an idle worker's step loop.")
    standby_workers: int | None = option(
        None,
        "Number of standby worker processes per replica, imported and prepared; default: 1 where memory "
        "allows, else 0.",
    )
    faults: str = option(
        "", "Plan of faults to inject, for staging; see docs/how-to/fault-injection.md. Default: none."
    )


@dataclass(frozen=True, kw_only=True)
class SleepConfig:
    """Releasing memory while there is nothing to do."""

    sleep_after: float | None = option(
        None, "Seconds of idleness after which the engine falls asleep; default: never."
    )
    sleep_level: int = option(
        1,
        "Depth of that sleep: 0 pauses, 1 moves weights to host memory and drops the KV cache, 2 drops the "
        "weights, too, 3 ends the worker processes.",
    )
    wake_on_request: bool = option(
        True,
        "Wake the engine for a request that arrives during sleep, instead of refusing it with status 503.",
    )
