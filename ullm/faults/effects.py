"""Faults carried out, and what came of them: a fault that is counted and has no effect is a fault of ullm."""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ullm.errors import ConfigError, FaultInjected
from ullm.faults.history import FiredFault
from ullm.faults.plan import Fault

A_LONG_TIME = 1e9
"""Seconds; stands for an unlimited time where a finite number is needed."""

RAISED = "raised"
LOST = "worker lost"
OVERTAKEN_WITHIN = 10.0
"""Seconds from a fault to the orderly end of its worker in which the worker may not have come to it. One that
has lived for longer with a fault that should have ended it did not carry it out."""
MOST = 1000
"""Faults to wait for at a time."""
_RAISING = ("raise", "disk_full")


@dataclass(frozen=True, slots=True)
class Firing:
    """A fault to carry out, and its record in the history, which is told what came of it."""

    fault: Fault
    record: FiredFault

    @property
    def action(self) -> str:
        """What is to happen."""
        return self.fault.action

    def note(self, effect: str) -> None:
        """Record what has been done."""
        self.record.effect = effect


async def carry_out(firing: Firing) -> None:
    """Carry out a fault in a task of trio.

    Raises:
        FaultInjected: by the action ``raise``.
        OSError: by ``disk_full``.
        ConfigError: ``jump`` on a clock that cannot.
    """
    import trio

    fault = firing.fault
    if fault.action in ("slow", "hang"):
        firing.note(f"waits {fault.duration:g} s" if fault.duration else "waits without end")
        await trio.sleep(fault.duration or A_LONG_TIME)
    elif fault.action == "jump":
        clock = trio.lowlevel.current_clock()
        if not hasattr(clock, "jump"):
            raise ConfigError(f"{fault}: only a virtual clock can jump, such as the one of ullm_clock")
        clock.jump(fault.duration)
        firing.note(f"the clock jumped {fault.duration:g} s")
    else:
        carry_out_now(firing)


def carry_out_now(firing: Firing) -> None:
    """Carry out a fault in synchronous code; whatever takes time blocks the thread.

    Raises:
        FaultInjected, OSError, ConfigError: as `carry_out`.
    """
    fault = firing.fault
    if fault.action == "raise":
        firing.note(RAISED)
        raise FaultInjected(f"raise at {fault.point}")
    if fault.action == "disk_full":
        firing.note(RAISED)
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected fault at {fault.point})")
    if fault.action == "jump":
        raise ConfigError(f"{fault}: a clock can jump at a point of a trio task only: await point(…)")
    firing.note(f"blocks {fault.duration:g} s" if fault.duration else "blocks without end")
    time.sleep(fault.duration or A_LONG_TIME)


@contextmanager
def note_overtaken(firings: Sequence[Firing]) -> Iterator[None]:
    """Note of faults that were to happen one after the other that a cancel or an exception came first."""
    try:
        yield
    except BaseException:
        for firing in firings:
            if not firing.record.effect:
                firing.note("overtaken: its task ended first")
        raise


class Losses:
    """Faults whose effect is somebody's end, until it is seen, and until there is a successor.

    Args:
        clock: as the history's.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._workers: deque[FiredFault] = deque(maxlen=MOST)
        self._actors: deque[FiredFault] = deque(maxlen=MOST)

    def __bool__(self) -> bool:
        return bool(self._workers or self._actors)

    def expect(self, fired: FiredFault, fault: Fault) -> None:
        """Take in a fault that has fired."""
        if fault.of_worker and (fault.fatal or fault.action in ("drop", "corrupt")):
            self._workers.append(fired)
        elif fault.action in _RAISING:
            self._actors.append(fired)

    def note_hit(self, point: str) -> None:
        """Note that somebody is at a point: again, if a fault has thrown him out there."""
        for fired in [each for each in self._actors if each.point == point]:
            self._actors.remove(fired)
            fired.recovered = self._clock() - fired.at

    def note_loss(self, replica: int, rank: int, epoch: int, cause: str) -> None:
        """Note the end of a worker that was not in order."""
        for fired in self._workers:
            if (fired.replica, fired.rank, fired.epoch) == (replica, rank, epoch):
                fired.effect = f"{LOST}: {cause}"

    def note_stop(self, replica: int, rank: int, epoch: int) -> None:
        """Note the end of a worker that was in order: it may have come before a fault that had just fired."""
        now = self._clock()
        for fired in list(self._workers):
            theirs = (fired.replica, fired.rank, fired.epoch) == (replica, rank, epoch)
            if theirs and not fired.effect and now - fired.at <= OVERTAKEN_WITHIN:
                fired.effect = "overtaken: its worker was stopped first"
                self._workers.remove(fired)

    def note_start(self, replica: int, rank: int, epoch: int) -> None:
        """Note that a worker is ready; faults of its place's former workers are settled."""
        for fired in [each for each in self._workers if (each.replica, each.rank) == (replica, rank)]:
            if fired.epoch is not None and fired.epoch < epoch:
                self._workers.remove(fired)
                if fired.effect.startswith(LOST):
                    fired.recovered = self._clock() - fired.at
