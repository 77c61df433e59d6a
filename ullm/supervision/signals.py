"""Signals that ask for a stop: the first drains, the second hurries, the third leaves now.

trio's signal receiver queues the signals, and a task answers them. A task cannot help where the event loop
is blocked or a thread never returns; there the `Watchdog` ends the process, which the handler itself can arm.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Final

import trio

from ullm.supervision.shutdown import EXIT_ABANDONED, EXIT_SIGNAL_BASE

log = logging.getLogger("ullm.supervision")

STOP_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)
)
"""SIGTERM, SIGINT, and on Windows SIGBREAK."""

FLUSH_SECONDS = 0.2
"""Seconds for the log to be written, when a signal forces the process to leave."""
REPORT_SECONDS = 1.0
"""Seconds for the stacks of all threads to be written, before the watchdog ends the process."""

SignalAction = Callable[[signal.Signals], None]


def forced_exit_code(signum: int) -> int:
    """Return the exit code of a process that a signal forced to leave: 128 + its number."""
    return EXIT_SIGNAL_BASE + signum


def leave_now(signum: signal.Signals) -> None:
    """End this process at once, without any cleanup, with code 128 + ``signum``."""
    _flush_log(FLUSH_SECONDS)
    os._exit(forced_exit_code(signum))


def _flush_log(seconds: float) -> None:
    """Flush the handlers that this library's log lines reach; leave behind one that takes too long."""
    flushing = threading.Thread(target=_flush_handlers, name="log flush", daemon=True)
    try:
        flushing.start()
    except RuntimeError:  # a limit of processes is reached; leaving matters more than the log
        return
    flushing.join(seconds)


def _flush_handlers() -> None:
    logger: logging.Logger | None = log
    while logger is not None:
        for handler in logger.handlers:
            handler.flush()
        logger = logger.parent if logger.propagate else None


def remember_signals(signals: Sequence[signal.Signals] = STOP_SIGNALS) -> list[signal.Signals]:
    """Install handlers that only remember signals, in the list that is returned.

    Meant for the time in which a program has something to clean up already, but cannot answer signals
    yet; when it can, it passes each to `signal.raise_signal`.
    """
    remembered: list[signal.Signals] = []

    def remember(number: int, frame: FrameType | None) -> None:
        remembered.append(signal.Signals(number))

    for number in signals:
        signal.signal(number, remember)
    return remembered


async def signal_ladder(
    drain: SignalAction,
    hurry: SignalAction,
    kill: SignalAction = leave_now,
    *,
    signals: Sequence[signal.Signals] = STOP_SIGNALS,
    at_once: Callable[[signal.Signals, int], None] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the first signal with ``drain``, the second with ``hurry``, any further one with ``kill``.

    Run until cancelled, and then restore the previous handlers; ready when its own are installed. It may
    run in any nursery, or as a supervised child.

    Args:
        drain: asks for an orderly stop.
        hurry: skips the rest of the drain.
        kill: ends everything by force, with code 128 + the signal's number.
        signals: the signals to answer.
        at_once: called in the handler itself, so even if the event loop is blocked, with the signal and
            the number of signals so far.

    Raises:
        RuntimeError: trio does not run in the main thread, the only one that can handle signals.
    """
    with trio.open_signal_receiver(*signals) as received, _calling(at_once, signals):
        task_status.started()
        count = 0
        async for number in received:
            step, action = ((drain, "drain"), (hurry, "hurry"), (kill, "kill"))[min(count, 2)]
            count += 1
            signum = signal.Signals(number)
            log.info(
                "signal received  signal=%(signal)s count=%(count)d action=%(action)s",
                {"signal": signum.name, "count": count, "action": action},
            )
            step(signum)


@contextmanager
def _calling(
    at_once: Callable[[signal.Signals, int], None] | None, signals: Sequence[signal.Signals]
) -> Iterator[None]:
    """Call ``at_once`` before the handlers that are installed."""
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in signals}
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if at_once is not None:
            at_once(signal.Signals(number), count)
        previous[number](number, frame)

    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, previous[number])


class Watchdog:
    """A daemon thread that ends the process if an orderly stop has not done so in time.

    It works without the event loop, so also when that is blocked, but needs the interpreter: it cannot
    run while a C extension holds the GIL. As a context manager its thread runs from the start, so that arming
    it, in a signal handler maybe, needs no new thread where a limit of them is reached; it is cancelled on
    leaving the block.

    Args:
        exit_code: exit code of the process.
        exit: ends the process; replaced in tests.

    Attributes:
        cleanup: called in the watchdog's thread before the exit, to remove what would outlive the process.
    """

    def __init__(self, exit_code: int = EXIT_ABANDONED, exit: Callable[[int], object] = os._exit) -> None:
        self.exit_code = exit_code
        self.cleanup: Callable[[], object] = bool
        self._exit = exit
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._cancelled = False
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float) -> None:
        """End the process ``seconds`` from now; if it is already armed, the earlier time holds."""
        with self._changed:
            deadline = time.monotonic() + seconds
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            self._start()
            self._changed.notify()

    def cancel(self) -> None:
        """Disarm: everything ended in time. It can be armed again."""
        with self._changed:
            self._deadline, self._cancelled = None, True
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            thread.join()

    def __enter__(self) -> Watchdog:
        with self._changed:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _start(self) -> None:
        if self._thread is not None:
            return
        self._cancelled = False
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("no watchdog of the stop: %s", error)
        else:
            self._thread = thread

    def _watch(self) -> None:
        with self._changed:
            while not self._cancelled:
                left = math.inf if self._deadline is None else self._deadline - time.monotonic()
                if left <= 0.0:
                    break
                # Longer waits than this overflow on some platforms.
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            else:
                return
            self._deadline = None
        # In another thread, because a write blocks if nobody reads stderr.
        report = threading.Thread(target=self._report, daemon=True)
        with suppress(RuntimeError):  # a limit of threads is reached: no report
            report.start()
            report.join(REPORT_SECONDS)
        try:
            self.cleanup()
        finally:
            self._exit(self.exit_code)

    def _report(self) -> None:
        """Write the stacks of all threads to stderr, not to the log, which may be what hangs."""
        stderr = sys.__stderr__
        if stderr is None:
            return
        stderr.write(
            f"not stopped in time; leaving with exit code {self.exit_code}. Threads that still run:\n"
        )
        faulthandler.dump_traceback(stderr)
        stderr.flush()
