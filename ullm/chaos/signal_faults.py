"""Signals as faults: workers that die, hang or pause, and standby workers that die or hang."""

from __future__ import annotations

import random
import signal
import sys
from dataclasses import dataclass
from typing import Any

import trio

from ullm.chaos.verify import settle
from ullm.chaos.world import FOUND_OUT, NOTHING, FaultKind, World
from ullm.testing.processes import psutil_module

GONE_WITHIN = 10.0
"""Seconds within which a worker that a signal ends has ended."""

DEADLY = ("SIGKILL", "SIGSEGV")
"""Signals that end any worker. One that serves leaves SIGTERM to the engine, which will stop it in order."""


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

    async def inject(self, world: World, source: random.Random) -> str:
        """Send the signal; a process that has just ended is no fault."""
        processes = await (world.standbys() if self.standby else world.workers(serving=self.serving))
        if not processes:
            return NOTHING
        process = source.choice(sorted(processes, key=lambda each: each.pid))
        hang = self.crashes and self.number.name == "SIGSTOP"
        if self.crashes and not hang:
            world.note_crash()
        if not _send(process, self.number):
            return NOTHING
        if hang:
            world.nursery.start_soon(world.note_hang)
        if self.number.name in DEADLY or hang:
            world.nursery.start_soon(_must_end, world, process, self.name)
        if self.resume:
            pause = self.resume * world.step_timeout * source.uniform(0.2, 1)
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


async def _must_end(world: World, process: Any, name: str) -> None:
    """Record a violation if a signal does not end a worker, or a hang does not have it ended."""

    async def has_ended() -> bool:
        try:
            return not process.is_running() or process.status() == psutil_module().STATUS_ZOMBIE
        except psutil_module().NoSuchProcess:
            return True

    if not await settle(has_ended, GONE_WITHIN + FOUND_OUT * world.step_timeout):
        world.violations.append(f"{name}: worker {process.pid} goes on as if nothing had happened")


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
