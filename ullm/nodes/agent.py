"""The agent of a host beside the engine's own: it connects to the engine, and runs workers for it.

An agent has no model and no requests of its own. If the engine is lost, it ends its workers and connects
again, since an engine that was killed may be started anew. It ends when the engine has stopped in order.
"""

from __future__ import annotations

import itertools
import math
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import cast

import trio

from ullm.actors.transports.base import OpenTransport, Pipe, Transport, WorkerSpec
from ullm.actors.transports.process import open_process
from ullm.config import EngineConfig
from ullm.errors import (
    ConfigError,
    HandshakeRefused,
    LinkLost,
    ResourceUnavailable,
    ServerUnreachable,
    UllmError,
    WorkerLost,
    first_cause,
)
from ullm.hub import LocalModel
from ullm.logs import get_logger
from ullm.nodes.head import NODE_PORT
from ullm.nodes.interfaces import interface_for_ranks
from ullm.nodes.link import Link, call
from ullm.nodes.tunnels import LOOPBACK, LinkedStreams, connect_loopback, splice
from ullm.protocol import stop_budget
from ullm.protocol.frames import FrameReader, encode
from ullm.protocol.messages import ToWorker
from ullm.protocol.node_messages import (
    Beat,
    CloseWorker,
    ConnectStream,
    Dismiss,
    Enlist,
    Enroll,
    FindModel,
    Found,
    FromNodeWorker,
    KillWorker,
    Leaving,
    NodeWorkerLost,
    Opened,
    OpenTunnel,
    OpenWorker,
    Refused,
    StopWorker,
    StreamData,
    StreamOpened,
    ToNode,
    ToNodeWorker,
    TunnelOpen,
    WorkerStopped,
)
from ullm.protocol.shared_secret import read_secret
from ullm.supervision import exponential_backoff
from ullm.tls.link_tls import link_tls

log = get_logger(__name__)

BACKOFF_SECONDS, BACKOFF_LIMIT = 0.2, 5.0
"""Delay between two attempts to connect: doubled each time, up to the limit."""
CONNECT_SECONDS = 5.0
"""For one attempt."""

FindModelFiles = Callable[[EngineConfig], LocalModel]


class Agent:
    """Connects to an engine, again and again, until it is dismissed.

    Args:
        config: where the engine is, which host this one is, and the secret.
        find_model: finds or fetches a model's files; called in a thread.
        open_transport: starts a worker.
    """

    def __init__(
        self,
        config: EngineConfig,
        find_model: FindModelFiles,
        open_transport: OpenTransport = open_process,
    ) -> None:
        assert config.node_secret_file is not None, "the configuration demands it"
        self._config = config
        self._secret = read_secret(config.node_secret_file, "--node-secret-file")
        self._tls = link_tls(config)
        self._open_transport = open_transport
        self._find_model = find_model
        self._address = (config.master_addr, config.nccl_port or NODE_PORT)
        self._session: Session | None = None
        self._scope = trio.CancelScope()
        self._leaving = False

    async def run(self, joined: Callable[[str], None] = lambda _: None) -> None:
        """Serve the engine until it dismisses this agent, or `leave` was called.

        Args:
            joined: called with the engine's address whenever it has let this agent in.

        Raises:
            ConfigError: the engine lets this host not in.
            ServerUnreachable: there is no engine for as long as ``--start-timeout``.
        """
        delay, attempt, last = exponential_backoff(BACKOFF_SECONDS, BACKOFF_LIMIT), 0, trio.current_time()
        with self._scope:
            while not self._leaving:
                try:
                    with trio.fail_after(CONNECT_SECONDS):
                        stream = await trio.open_tcp_stream(*self._address)
                    async with stream:
                        with trio.fail_after(CONNECT_SECONDS):
                            secured = await self._secured(stream)
                        own = str(stream.socket.getsockname()[0])
                        attempt, dismissed = 0, await self._serve(secured, own, joined)
                    if dismissed:
                        return
                    last = trio.current_time()
                except (OSError, trio.TooSlowError, LinkLost) as error:
                    waited, limit = trio.current_time() - last, self._config.start_timeout
                    if waited > limit:
                        raise ServerUnreachable(
                            self._where, f"no engine for {limit:g} s (--start-timeout): {_cause(error)}"
                        ) from None
                    log.debug("no engine yet", address=self._where, cause=_cause(error))
                except HandshakeRefused as error:
                    raise ResourceUnavailable(
                        f"the engine at {self._where} and this host do not let each other in: {error}"
                    ) from None
                attempt += 1
                await trio.sleep(delay(attempt))

    def leave(self) -> None:
        """Leave in order: at once, or, while the engine drains, when it has stopped."""
        self._leaving = True
        if self._session is None:
            self._scope.cancel()
        else:
            self._session.leave()
            self._scope.deadline = trio.current_time() + stop_budget.engine_seconds(
                self._config.shutdown_timeout
            )

    def leave_now(self) -> None:
        """Leave, and kill the workers."""
        self._scope.cancel()

    @property
    def _where(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    async def _secured(self, stream: trio.SocketStream) -> trio.abc.Stream:
        return stream if self._tls is None else await self._tls.connect(stream, self._address[0])

    async def _serve(self, stream: trio.abc.Stream, own: str, joined: Callable[[str], None]) -> bool:
        """Serve the engine at the other end of a connection; return whether it dismissed this agent.

        Args:
            own: this host's address.

        Raises:
            LinkLost: it was lost before it had let this agent in.
        """
        await call(stream, self._secret)
        session = self._session = Session(
            stream, own, self._config, self._open_transport, self._find_model, lambda: joined(self._where)
        )
        try:
            await session.run()
        except LinkLost as error:
            if not session.enlisted:
                raise
            log.warning(
                "the engine was lost, its workers here have ended", address=self._where, cause=f"it {error}"
            )
        finally:
            self._session = None
        return session.dismissed


class NodeWorker:
    """A worker of this host: what the engine has sent for it, and what has become of it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.scope = trio.CancelScope()
        self.transport: Transport | None = None
        self.nursery: trio.Nursery | None = None
        self.deliver, self.frames = trio.open_memory_channel[bytes](math.inf)


class Session:
    """One connection to the engine; all workers end with it."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        own_address: str,
        config: EngineConfig,
        open_transport: OpenTransport,
        find_model: FindModelFiles,
        joined: Callable[[], None],
    ) -> None:
        self.enlisted = self.dismissed = False
        self._link: Link[ToNode] = Link(stream, ToNode, config.node_timeout, self._beat)
        self._config, self._open_transport, self._find_model = config, open_transport, find_model
        self._joined = joined
        self._own_address = own_address
        self._workers: dict[int, NodeWorker] = {}
        self._streams = LinkedStreams(self._link.send)
        self._stream_numbers = itertools.count(2, 2)  # the engine takes the odd ones
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Do what the engine asks for until it is lost, or dismisses this agent.

        Raises:
            LinkLost: it is lost.
            HandshakeRefused: it has no place for this host.
        """
        config = self._config
        enroll = Enroll(config.node_rank, config.nnodes, socket.gethostname(), config.node_timeout)
        self._link.send(enroll)
        try:
            async with trio.open_nursery() as self._nursery:
                await self._link.run(self._take)
        except BaseExceptionGroup as group:
            raise _most_telling(group) from None

    def leave(self) -> None:
        """Tell the engine that this agent wants to leave."""
        self._link.send(Leaving())

    def _beat(self) -> Beat:
        workers = self._workers.values()
        return Beat(tuple(each.number for each in workers if each.transport and each.transport.suspended()))

    def _take(self, message: ToNode) -> None:
        match message:
            case ToNodeWorker():
                if worker := self._workers.get(message.worker):
                    worker.deliver.send_nowait(message.frame)
            case Beat():
                return
            case StreamData():
                self._streams.take(message)
            case OpenWorker():
                worker = self._workers[message.worker] = NodeWorker(message.worker)
                self._nursery.start_soon(self._run_worker, worker, message)
            case KillWorker() | CloseWorker() | StopWorker() | OpenTunnel():
                if worker := self._workers.get(message.worker):
                    self._take_for(worker, message)
            case FindModel():
                self._nursery.start_soon(self._find, message)
            case ConnectStream():
                self._nursery.start_soon(connect_loopback, self._streams.open(message.stream), message.port)
            case Enlist():
                self.enlisted = True
                self._joined()
            case Dismiss():
                self.dismissed = True
                self._nursery.cancel_scope.cancel()
            case Refused():
                raise HandshakeRefused(message.reason) if message.for_good else LinkLost(message.reason)

    def _take_for(
        self, worker: NodeWorker, message: KillWorker | CloseWorker | StopWorker | OpenTunnel
    ) -> None:
        match message:
            case KillWorker():
                if worker.transport is not None:
                    worker.transport.kill()
            case CloseWorker():
                worker.scope.cancel()
            case StopWorker():
                if worker.transport is not None:
                    self._nursery.start_soon(self._stop_worker, worker.transport, message)
            case OpenTunnel():
                if worker.nursery is not None:
                    worker.nursery.start_soon(self._tunnel, worker)

    # --- workers -------------------------------------------------------------------------------------------

    async def _run_worker(self, worker: NodeWorker, message: OpenWorker) -> None:
        spec = WorkerSpec(message.rank, message.runner, message.cpu_threads)
        try:
            interface = "" if message.alone else interface_for_ranks(self._own_address)
            with worker.scope:
                async with self._open_transport(replace(spec, interface=interface)) as transport:
                    worker.transport = transport
                    self._link.send(Opened(worker.number))
                    async with trio.open_nursery() as nursery:
                        worker.nursery = nursery
                        nursery.start_soon(self._send_frames, worker, transport)
                        nursery.start_soon(self._receive_frames, worker, transport)
        except (OSError, ConfigError) as error:
            self._link.send(Opened(worker.number, failure=_cause(error)))
        finally:
            del self._workers[worker.number]

    async def _send_frames(self, worker: NodeWorker, transport: Transport) -> None:
        reader: FrameReader[ToWorker] = FrameReader(ToWorker)
        async for frame in worker.frames:
            with suppress(WorkerLost):  # which `receive` reports
                if isinstance(transport, Pipe):  # faults may have made it something else than a message
                    await transport.send_bytes(frame)
                else:
                    reader.feed(frame)
                    await transport.send(cast(ToWorker, reader.next()))

    async def _receive_frames(self, worker: NodeWorker, transport: Transport) -> None:
        try:
            while True:
                message = await transport.receive()
                self._link.send(FromNodeWorker(worker.number, encode(message)))
        except WorkerLost as error:
            self._link.send(NodeWorkerLost(worker.number, error.cause, error.stderr_tail))

    async def _stop_worker(self, transport: Transport, message: StopWorker) -> None:
        report = await transport.stop(message.budget)
        self._link.send(WorkerStopped(message.worker, report.outcome, report.seconds, report.timings))

    async def _tunnel(self, worker: NodeWorker) -> None:
        """Have the worker reach its rendezvous at a port of loopback, for as long as it lives."""
        try:
            (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        except OSError as error:
            cause = f"has no way to its rendezvous: {_cause(error)}"
            return self._link.send(NodeWorkerLost(worker.number, cause, ()))
        self._link.send(TunnelOpen(worker.number, int(listener.socket.getsockname()[1])))

        async def accept(stream: trio.SocketStream) -> None:
            number = next(self._stream_numbers)
            linked = self._streams.open(number)
            self._link.send(StreamOpened(worker.number, number))
            await splice(linked, stream)

        await trio.serve_listeners(accept, [listener])

    async def _find(self, message: FindModel) -> None:
        try:
            model = await trio.to_thread.run_sync(self._find_model, message.config)
        except (UllmError, OSError) as error:
            failure = (type(error).__name__, _cause(error))
            return self._link.send(Found(message.question, failure=failure))
        self._link.send(Found(message.question, str(model.path), str(model.tokenizer_path)))


def _cause(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _most_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return a refusal if there is one, else the first error."""
    refusals = group.subgroup(HandshakeRefused)
    return first_cause(refusals if refusals is not None else group)
