"""One protocol for every kind of worker: how to talk to it, and how to end it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from ullm.protocol.messages import FromWorker, RankSpec, ToWorker

STDERR_TAIL_LINES = 20
"""Lines of a worker's stderr that are kept for the one-line root cause."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a transport needs to bring up one worker.

    Args:
        rank: who the worker is; ``rank.name`` names it in logs.
        runner: ``module:class`` of the `ullm.protocol.runner.Runner` to build in the worker.
        cpu_threads: threads that the worker computes with; None: all cores.
        standby: the worker is a spare one, and gives way to others while it is being prepared.
    """

    rank: RankSpec
    runner: str
    cpu_threads: int | None = None
    standby: bool = False


class Transport(Protocol):
    """A running worker, seen from the engine."""

    @property
    def name(self) -> str:
        """The worker's name, as in logs."""

    @property
    def pid(self) -> int | None:
        """The worker's process id; None where it has no process of its own."""

    async def send(self, message: ToWorker) -> None:
        """Send one message.

        Raises:
            WorkerLost: the worker is gone.
        """

    async def receive(self) -> FromWorker:
        """The next message; exactly one task receives.

        Raises:
            WorkerLost: the worker is gone; names exit status or signal and the tail of its stderr.
        """

    def alive(self) -> bool:
        """Whether the worker has not ended."""

    def suspended(self) -> bool:
        """Whether the operating system has suspended it, by SIGSTOP; False where that cannot be known."""

    def kill(self) -> None:
        """End the worker now. A thread cannot be killed: it is told to stop, and counts as lost."""

    async def stop(self, budget: float) -> StopReport:
        """Ask for an orderly end, wait, then use force; done after ``budget`` seconds at the latest.

        Processes get `Stop`, then SIGTERM for the last quarter of the budget, then SIGKILL.
        """


@dataclass(frozen=True)
class StopReport:
    """How a worker ended.

    Args:
        outcome: ``stopped`` in order, ``killed`` by force, ``abandoned``: a thread that hangs still,
            ``lost``: it had ended by itself before it was asked.
        seconds: how long it took.
        timings: the worker's own account, stage → seconds.
    """

    name: str
    outcome: str
    seconds: float
    timings: dict[str, float]


OpenTransport = Callable[[WorkerSpec], AbstractAsyncContextManager[Transport]]
"""Starts a worker; leaving the context kills what `Transport.stop` has not ended, and reaps it."""
