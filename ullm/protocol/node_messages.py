"""What an engine and the agents on its other hosts say to each other: one connection each, many workers.

Messages from and to a worker cross it as the frames that they are on the worker's own pipe.
"""

from __future__ import annotations

import msgspec

from ullm.config import EngineConfig
from ullm.protocol.messages import RankSpec


class NodeFrame(msgspec.Struct, tag=True, frozen=True):
    """Base of all of them."""


# --- in both directions ------------------------------------------------------------------------------------


class Beat(NodeFrame, frozen=True):
    """A sign of life.

    Args:
        suspended: from an agent: its workers that a signal has stopped.
    """

    suspended: tuple[int, ...] = ()


class StreamData(NodeFrame, frozen=True):
    """Bytes of a tunnel's stream; none: it has ended."""

    stream: int
    data: bytes


# --- from the engine ---------------------------------------------------------------------------------------


class Enlist(NodeFrame, frozen=True):
    """The first message: this agent's place is taken, and it may be asked for workers."""


class FindModel(NodeFrame, frozen=True):
    """Find or fetch the model's files, and answer `Found`."""

    question: int
    config: EngineConfig


class OpenWorker(NodeFrame, frozen=True):
    """Start a worker, as `ullm.actors.transports.base.WorkerSpec` describes it; answer `Opened`."""

    worker: int
    rank: RankSpec
    runner: str
    cpu_threads: int | None
    alone: bool


class ToNodeWorker(NodeFrame, frozen=True):
    """A frame for a worker."""

    worker: int
    frame: bytes


class KillWorker(NodeFrame, frozen=True):
    """Kill a worker now."""

    worker: int


class StopWorker(NodeFrame, frozen=True):
    """Stop a worker in order within some seconds, then by force; answer `WorkerStopped`."""

    worker: int
    budget: float


class CloseWorker(NodeFrame, frozen=True):
    """Leave a worker's context: kill it if it still runs, and reap it."""

    worker: int


class OpenTunnel(NodeFrame, frozen=True):
    """Listen on a port of loopback for a worker's ranks to meet at, and answer `TunnelOpen`."""

    worker: int


class ConnectStream(NodeFrame, frozen=True):
    """Connect a new stream to a port of loopback."""

    stream: int
    port: int


class Dismiss(NodeFrame, frozen=True):
    """End: the engine has stopped, or it does without this agent, which was asked to stop."""


# --- from an agent -----------------------------------------------------------------------------------------


class Enroll(NodeFrame, frozen=True):
    """The first message: whose agent this is, and its ``--node-timeout``."""

    node_rank: int
    nnodes: int
    host: str
    silence: float


class Found(NodeFrame, frozen=True):
    """Where the model's files are on this host.

    Args:
        failure: why they are not; the name of one of `ullm.errors` and its text.
    """

    question: int
    model_path: str = ""
    tokenizer_path: str = ""
    failure: tuple[str, str] | None = None


class Opened(NodeFrame, frozen=True):
    """A worker was started, or, if ``failure`` says why, was not."""

    worker: int
    failure: str = ""


class FromNodeWorker(NodeFrame, frozen=True):
    """A frame of a worker's."""

    worker: int
    frame: bytes


class NodeWorkerLost(NodeFrame, frozen=True):
    """A worker has ended; the last frame came before this."""

    worker: int
    cause: str
    stderr_tail: tuple[str, ...]


class WorkerStopped(NodeFrame, frozen=True):
    """How a worker ended, as `ullm.actors.transports.base.StopReport` says it."""

    worker: int
    outcome: str
    seconds: float
    timings: dict[str, float]


class TunnelOpen(NodeFrame, frozen=True):
    """Where the tunnel of a worker's rendezvous begins."""

    worker: int
    port: int


class StreamOpened(NodeFrame, frozen=True):
    """Something has connected there: a new stream, numbered by the agent."""

    worker: int
    stream: int


class Leaving(NodeFrame, frozen=True):
    """This agent was asked to stop; it waits for `Dismiss` as long as it may."""


class Refused(NodeFrame, frozen=True):
    """From the engine: it has no place for this agent, or, unless ``for_good``, not now."""

    reason: str
    for_good: bool


ToNode = (
    Beat
    | StreamData
    | Enlist
    | FindModel
    | OpenWorker
    | ToNodeWorker
    | KillWorker
    | StopWorker
    | CloseWorker
    | OpenTunnel
    | ConnectStream
    | Dismiss
    | Refused
)
FromNode = (
    Beat
    | StreamData
    | Enroll
    | Found
    | Opened
    | FromNodeWorker
    | NodeWorkerLost
    | WorkerStopped
    | TunnelOpen
    | StreamOpened
    | Leaving
)
