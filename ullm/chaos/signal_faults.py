"""Signals as faults: workers that die, hang or pause, and standby workers that die or hang."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from typing import Any

import trio

from ullm.chaos.world import NOTHING, FaultKind, World
from ullm.testing.processes import psutil_module


@dataclass(frozen=True)
class WorkerSignalFault:
    """A signal to a worker in service.

    Args:
        number: the signal; SIGSTOP without ``resume`` is a hang.
        resume: share of the step timeout after which the worker continues.
        standby: True for a standby worker instead of one in service.
        serving: True for ready workers only; a start may be silent for longer than a chaos run can wait.
    """

    name: str
    number: signal.Signals
    crashes: bool = True
    resume: float = 0.0
    standby: bool = False
    serving: bool = False
    weight: float = 1.0

    async def offered(self, world: World) -> bool:
        """Return True if there are such workers; standby workers may be turned off."""
        return not self.standby or bool(await world.standbys())

    async def inject(self, world: World) -> str:
        """Send the signal; a process that has just ended is no fault."""
        processes = await (world.standbys() if self.standby else world.workers(serving=self.serving))
        if not processes:
            return NOTHING
        process = world.source.choice(processes)
        hang = self.crashes and self.number.name == "SIGSTOP"
        if self.crashes and not hang:
            world.note_crash()
        if not _send(process, self.number):
            return NOTHING
        if hang:
            world.nursery.start_soon(world.note_hang)
        if self.resume:
            pause = self.resume * world.step_timeout * world.source.uniform(0.2, 1)
            world.nursery.start_soon(_resume, process, pause)
        return f"{self.number.name} to worker {process.pid}"


def _kinds() -> tuple[FaultKind, ...]:
    if sys.platform == "win32":  # which has no such signals
        return ()
    return (
        WorkerSignalFault("worker.kill", signal.SIGKILL, weight=3),
        WorkerSignalFault("worker.segv", signal.SIGSEGV),
        WorkerSignalFault("worker.term", signal.SIGTERM),
        WorkerSignalFault("worker.stop", signal.SIGSTOP, serving=True),
        WorkerSignalFault("worker.pause", signal.SIGSTOP, crashes=False, resume=0.4),
        WorkerSignalFault("standby.kill", signal.SIGKILL, crashes=False, standby=True),
        WorkerSignalFault("standby.stop", signal.SIGSTOP, crashes=False, standby=True, weight=0.5),
    )


KINDS = _kinds()


async def _resume(process: Any, seconds: float) -> None:
    await trio.sleep(seconds)
    if sys.platform != "win32":
        _send(process, signal.SIGCONT)


def _send(process: Any, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)
        return True
    except psutil_module().NoSuchProcess:
        return False
