"""The protocol of every kind of worker: how to exchange messages with it, and how to end it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ullm.protocol.messages import FromWorker, RankSpec, ToWorker

STDERR_TAIL_LINES = 20
"""Lines of a lost worker's stderr to keep for its error."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a transport needs to start one worker.

    Args:
        rank: the worker's place; ``rank.name`` is its name in logs.
        runner: ``module:class`` of the `ullm.protocol.runner.Runner` to build in the worker.
        cpu_threads: number of compute threads; None: all cores.
        standby: whether the worker is a standby one, which runs at a low priority while it prepares.
        node: index of the host to start it on; 0 is the engine's own.
        meets_on: the host of its replica's first rank, where the ranks meet.
        alone: whether all ranks of its replica are on one host.
        interface: the network interface by which ranks on several hosts reach each other; empty: loopback.
    """

    rank: RankSpec
    runner: str
    cpu_threads: int | None = None
    standby: bool = False
    node: int = 0
    meets_on: int = 0
    alone: bool = True
    interface: str = ""


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
        """Return the next message; exactly one task receives.

        Raises:
            WorkerLost: the worker is gone; includes its exit status or signal and the tail of its stderr.
        """

    def alive(self) -> bool:
        """Whether the worker runs."""

    def suspended(self) -> bool:
        """Whether the operating system has suspended it, by SIGSTOP; False where this is unknown."""

    def kill(self) -> None:
        """Kill the worker. A thread cannot be killed: it is told to stop, and counts as lost."""

    async def stop(self, budget: float) -> StopReport:
        """Ask for an orderly end, wait, then use force; return within ``budget`` seconds.

        Processes get `Stop`, then SIGTERM for the last quarter of the budget, then SIGKILL.
        """


@runtime_checkable
class Pipe(Protocol):
    """A transport that carries bytes."""

    async def send_bytes(self, frame: bytes) -> None:
        """Send bytes that need not be a valid frame."""

    def unread(self, data: bytes) -> None:
        """Put bytes in front of those still to be read."""


@dataclass(frozen=True)
class StopReport:
    """How a worker ended.

    Args:
        outcome: ``stopped``: in order; ``killed``: by force; ``abandoned``: a thread that still hangs;
            ``lost``: the worker had ended by itself before it was asked to.
        seconds: duration of the stop.
        timings: stage → seconds, as reported by the worker.
    """

    name: str
    outcome: str
    seconds: float
    timings: dict[str, float]


OpenTransport = Callable[[WorkerSpec], AbstractAsyncContextManager[Transport]]
"""Starts a worker; leaving the context kills it unless `Transport.stop` has ended it, and reaps it."""
