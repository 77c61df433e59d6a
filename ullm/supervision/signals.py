"""Signals that ask for a stop: the first drains, the second hurries, the third leaves now.

Handlers put into a queue (trio's signal receiver does that), and the work is done in a task. What a task
cannot bound, a blocked event loop or a thread that never returns, the `Watchdog` ends, which the handler
itself arms.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Final

import trio

from ullm.logs import flush, get_logger
from ullm.supervision.shutdown import EXIT_ABANDONED, EXIT_SIGNAL_BASE

log = get_logger("ullm.supervision")

STOP_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)
)
"""SIGTERM, SIGINT, and on Windows SIGBREAK."""

FLUSH_SECONDS = 0.2
"""For the log, when a signal forces the process to leave."""
REPORT_SECONDS = 1.0
"""For the stacks of what hangs, before the process is ended."""

SignalAction = Callable[[signal.Signals], None]


def forced_exit_code(signum: int) -> int:
    """The exit code of a process that a signal forced to leave: 128 + its number."""
    return EXIT_SIGNAL_BASE + signum


def leave_now(signum: signal.Signals) -> None:
    """End this process at once, without any cleanup, with code 128 + ``signum``."""
    flush(FLUSH_SECONDS)
    os._exit(forced_exit_code(signum))


def remember_signals(signals: Sequence[signal.Signals] = STOP_SIGNALS) -> list[signal.Signals]:
    """Until other handlers are installed, remember what comes, in the list that this returns.

    For the time in which a program makes what has to be cleaned up, and cannot answer signals yet; when it
    can, `signal.raise_signal` says them again.
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

    Runs until it is cancelled and then restores the handlers that were there before; it is ready when
    its own are installed. It may run in any nursery, or as a supervised child.

    Args:
        drain: asks for an orderly stop.
        hurry: skips the rest of the drain.
        kill: ends everything by force, with code 128 + the signal's number.
        at_once: called in the handler, with how many there have been; also where the event loop is stuck.

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
            log.info("signal received", signal=signum.name, count=count, action=action)
            step(signum)


@contextmanager
def _calling(
    at_once: Callable[[signal.Signals, int], None] | None, signals: Sequence[signal.Signals]
) -> Iterator[None]:
    """Have the handlers that are installed preceded by ``at_once``."""
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
    """A daemon thread that ends the process when an orderly stop has not done so in time.

    It needs nothing of the event loop, so it also works when that is blocked; it needs the
    interpreter, so it does not while a C extension holds the GIL. As a context manager it is
    cancelled on the way out.

    Args:
        exit_code: of the process.
        exit: ends it; replaced in tests.

    Attributes:
        cleanup: called before the exit, in a thread; for what would be left outside of the process.
    """

    def __init__(self, exit_code: int = EXIT_ABANDONED, exit: Callable[[int], object] = os._exit) -> None:
        self.exit_code = exit_code
        self.cleanup: Callable[[], object] = bool
        self._exit = exit
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float) -> None:
        """End the process ``seconds`` from now. Armed already: the earlier time holds."""
        with self._changed:
            deadline = time.monotonic() + seconds
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()
            self._changed.notify()

    def cancel(self) -> None:
        """Everything ended in time. It can be armed again."""
        with self._changed:
            self._deadline = None
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            thread.join()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _watch(self) -> None:
        with self._changed:
            while self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0.0:
                    break
                # Longer waits than this overflow on some platforms.
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            else:
                return
            self._deadline = None
        # In another thread, because nobody may read what is written.
        report = threading.Thread(target=self._report, daemon=True)
        report.start()
        report.join(REPORT_SECONDS)
        try:
            self.cleanup()
        finally:
            self._exit(self.exit_code)

    def _report(self) -> None:
        """To stderr, where the stacks show what hangs; the log may be what is stuck."""
        stderr = sys.__stderr__
        if stderr is None:
            return
        stderr.write(f"not stopped in time; leaving with exit code {self.exit_code}. What still runs:\n")
        faulthandler.dump_traceback(stderr)
        stderr.flush()
