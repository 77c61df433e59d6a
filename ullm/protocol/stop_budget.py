"""The seconds of a stop, in one table, so that they can be added up.

A stop has one absolute deadline, ``--shutdown-timeout`` seconds after the first request. Each stage may take
its budget at most, and passes on what it does not need::

    0                       the request: SIGTERM, POST /admin/shutdown, Engine.request_shutdown …
    │  drain                requests run to their ends
    T - TEARDOWN_RESERVE
    │  abort                READER_FLUSH: readers take the last outputs of the requests that were ended
    │  tree                 children stop in the reverse order of their start; each gets its own budget, or
    │                       its proportional share of the time left where that is less
    T = engine_seconds(timeout): the engine is gone
    │  overrun              a child that ignores its budget is killed, then abandoned
    T + WATCHDOG_MARGIN     the watchdog ends a process that still hangs, with exit code 71
       and once the engine is gone, PROCESS_LEAVE: threads and libraries that still hold the process

`tests/engine/test_stop_budget.py` adds them up. The supervision library has the seconds between a child's
budget and its abandonment (``SETTLE``, ``KILL_GRACE``), and its own default for programs without this table.
"""

from __future__ import annotations

from typing import Final

# --- the engine ----------------------------------------------------------------------------------------

TEARDOWN_RESERVE: Final = 3.0
"""Kept of the shutdown timeout for ending requests and stopping children; the least that a stop has."""
READER_FLUSH: Final = 1.0
"""For readers to take the last outputs of aborted requests."""

# --- children, in the order in which they stop -----------------------------------------------------------

LIFECYCLE: Final = 1.0
ROUTER: Final = 1.0
SCHEDULER: Final = 1.0
STANDBY_POOL: Final = 2.0
TOKENIZER: Final = 1.0
LINK: Final = 1.0
"""For each of the two children of a front end that hold its link to the engine, and for the engine's gate."""
HOSTS: Final = 1.5
"""For the agents on other hosts, which are dismissed once their workers have ended."""
HTTP_SERVER: Final = 2.0
"""For each of the two servers to flush and close its connections."""

# --- HTTP servers ---------------------------------------------------------------------------------------

CONNECTION_CUT_RESERVE: Final = 0.5
"""Connections are cut this long before the server's deadline, so that all is gone in time."""
HANDLER_FLUSH: Final = 5.0
"""For running handlers to finish where nobody has set a deadline."""

# --- worker groups: they have all of the time that is left --------------------------------------------

RANK_SHARE: Final = 0.95
"""Share of a group's time that its ranks have: their reports must be in before it is over."""
STARTING_WORKER: Final = 1.0
"""For a worker that is not ready yet, may be in the middle of loading, and has nothing to finish."""
FAULT_SHARE: Final = 0.1
"""Share of a rank's time that telling its worker to misbehave may take."""

SIGTERM_SHARE: Final = 0.75
"""Share of a rank's time after which a worker process gets SIGTERM."""
SIGKILL_SHARE: Final = 0.95
"""Share of a rank's time after which a worker process gets SIGKILL."""
PROCESS_EXIT: Final = 1.0
"""From a worker's closing its pipe to its end; and for the kernel to reap a process that was killed."""
STDERR_TAIL: Final = 0.2
"""For the end of a worker's stderr, which a grandchild may hold open."""
STANDBY_WORKER: Final = 0.4
"""For a standby worker."""

THREAD_REPORT: Final = 0.05
"""Of a worker thread's time, what is kept to report that it was abandoned."""
THREAD_GIVEN_UP: Final = 0.1
"""For a thread that was given up to end after all, before it is reported as abandoned."""
THREAD_LEAVE: Final = 0.5
"""For a thread that was told to stop, when its context is left."""

REMOTE_SHARE: Final = 0.9
"""Share of a rank's time that the agent on another host has for stopping it, and for saying so."""

RAY_KILL_SHARE: Final = 0.9
"""Share of a rank's time after which a Ray actor is killed."""
RAY_LEAVE: Final = 1.0
"""For the tasks of a Ray actor that has ended."""

HANDOVER: Final = 10.0
"""For the KV on its way from a replica that is stopped while the engine runs on; beyond it, and for what
comes after, it is computed again."""

# --- the process ----------------------------------------------------------------------------------------

WATCHDOG_MARGIN: Final = 5.0
"""From the deadline to the forced end of a process that still hangs."""
FORCED_EXIT: Final = 1.0
"""From the third signal to the end of a process whose event loop is stuck."""
LAUNCHER_RESERVE: Final = 2.0
"""Of a launcher's time, what is kept for the engine, after the front ends have been drained."""
PROCESS_LEAVE: Final = 3.0
"""From the end of the engine to the end of the process."""
LOG_FLUSH: Final = 0.5
"""Of that, for log records that are not written yet."""


def drain_seconds(timeout: float) -> float:
    """Return how long requests may run on in a stop that has ``timeout`` seconds."""
    return max(0.0, timeout - TEARDOWN_RESERVE)


def engine_seconds(timeout: float) -> float:
    """Return how long the engine has: ending requests and children takes time even without a drain."""
    return max(timeout, TEARDOWN_RESERVE)


def watchdog_seconds(timeout: float) -> float:
    """Return when the watchdog ends the process, counted from the request."""
    return timeout + WATCHDOG_MARGIN
