"""The engine's side of several hosts: it lets agents in, and starts workers on their hosts.

The workers of other hosts are transports like any other, so schedulers and worker groups need not know. A
host that is lost loses its workers; their groups start anew when its agent, or another one in its place, is
there again.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import msgspec
import trio

from ullm import errors
from ullm.actors.transports.base import OpenTransport, Transport, WorkerSpec
from ullm.config import EngineConfig
from ullm.errors import (
    ConfigError,
    HandshakeRefused,
    LinkLost,
    ModelError,
    ResourceUnavailable,
    WorkerLost,
    first_cause,
)
from ullm.logs import get_logger
from ullm.nodes.interfaces import interface_for_ranks
from ullm.nodes.link import HANDSHAKE_SECONDS, Link, answer_call
from ullm.nodes.remote_worker import RemoteWorker
from ullm.nodes.tunnels import LOOPBACK, LinkedStream, LinkedStreams, connect_loopback, splice
from ullm.protocol.messages import Prepare, Start
from ullm.protocol.node_messages import (
    Beat,
    CloseWorker,
    ConnectStream,
    Dismiss,
    Enlist,
    Enroll,
    FindModel,
    Found,
    FromNode,
    FromNodeWorker,
    Leaving,
    NodeWorkerLost,
    Opened,
    OpenTunnel,
    OpenWorker,
    Refused,
    StreamData,
    StreamOpened,
    TunnelOpen,
    WorkerStopped,
)
from ullm.protocol.shared_secret import read_secret
from ullm.tls.link_tls import link_tls

log = get_logger(__name__)

NODE_PORT = 29501
"""Where agents connect if ``--master-port`` does not say; vLLM's default."""
STRANGERS = 16
"""Connections that may be in a handshake at the same time."""
DISMISS_SECONDS = 1.0
"""For an agent that is not wanted any more to end the connection."""
LEAVE_SECONDS = 1.0
"""From an agent's wish to leave to the decision: hosts are often asked to stop at the same time."""


class Nodes:
    """The hosts beside the engine's own. `run` is a child of the engine; `open` starts workers anywhere.

    Args:
        open_local: starts workers on this host.
        draining: whether the engine stops, so that hosts have to stay until it has.
    """

    def __init__(
        self, config: EngineConfig, open_local: OpenTransport, draining: Callable[[], bool] = lambda: False
    ) -> None:
        assert config.node_secret_file is not None, "the configuration demands it"
        self._config = config
        self._secret = read_secret(config.node_secret_file, "--node-secret-file")
        self._tls = link_tls(config)
        self._open_local = open_local
        self._draining = draining
        self._hosts: dict[int, RemoteHost] = {}
        self._changed = trio.Event()
        self._strangers = trio.CapacityLimiter(STRANGERS)

    def connected(self) -> dict[int, str]:
        """Return the index and name of each other host whose agent is there."""
        return {node: host.name for node, host in sorted(self._hosts.items())}

    # --- for worker groups ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def open(self, spec: WorkerSpec) -> AsyncIterator[Transport]:
        """Start a worker on the host that it belongs to; an `OpenTransport`.

        Raises:
            WorkerLost: that host's agent did not come within ``--start-timeout``, or cannot start it.
        """
        if spec.node == 0:
            interface = "" if spec.alone else interface_for_ranks(self._config.master_addr)
            async with self._open_local(replace(spec, interface=interface)) as transport:
                yield transport
            return
        host = await self._host_for(spec)
        async with host.open_worker(spec) as worker:
            yield worker

    async def _host_for(self, spec: WorkerSpec) -> RemoteHost:
        seconds = self._config.start_timeout
        if spec.node not in self._hosts:
            log.info("waiting for a host", node_rank=spec.node, worker=spec.rank.name)
        with trio.move_on_after(seconds):
            while spec.node not in self._hosts:
                await self._changed.wait()
            return self._hosts[spec.node]
        raise WorkerLost(
            spec.rank.name,
            f"needs the host of --node-rank {spec.node}, which did not connect in {seconds:g} s",
        )

    # --- the supervised child ------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Listen for agents until cancelled, and then dismiss them.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        config = self._config
        port = config.nccl_port or NODE_PORT
        try:
            listeners = await trio.open_tcp_listeners(port, host=config.master_addr)
        except OSError as error:
            raise ResourceUnavailable(
                f"--master-addr {config.master_addr}, --master-port {port}: {error.strerror or error}; take "
                "an address of this host that the others reach, and a free port"
            ) from None
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                serve = partial(self._serve, nursery)
                await trio.serve_listeners(serve, listeners)
        finally:
            for listener in listeners:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(listener)

    async def _serve(self, nursery: trio.Nursery, stream: trio.SocketStream) -> None:
        """Serve one connection; whatever comes of it concerns this one only."""
        peer = str(stream.socket.getpeername()[0])
        try:
            async with stream:
                self._strangers.acquire_on_behalf_of_nowait(stream)
                try:
                    secured = await self._secured(stream)
                    await answer_call(secured, self._secret)
                    link: Link[FromNode] = Link(secured, FromNode, self._config.node_timeout, Beat)
                    with trio.fail_after(HANDSHAKE_SECONDS):
                        enroll = await link.receive()
                finally:
                    self._strangers.release_on_behalf_of(stream)
                await self._keep(link, enroll, peer)
        except trio.WouldBlock:
            log.warning("too many strangers at the hosts' port", address=peer)
        except (HandshakeRefused, trio.TooSlowError) as error:
            log.warning("a host was refused", address=peer, cause=str(error))
        except LinkLost as error:
            log.warning("a host was lost", address=peer, cause=f"it {error}")

    async def _secured(self, stream: trio.SocketStream) -> trio.abc.Stream:
        if self._tls is None:
            return stream
        with trio.fail_after(HANDSHAKE_SECONDS):
            return await self._tls.accept(stream)

    async def _keep(self, link: Link[FromNode], enroll: FromNode, peer: str) -> None:
        """Have a host for as long as its link holds."""
        if refusal := self._refusal(enroll):
            log.warning("a host was refused", address=peer, cause=refusal.reason)
            link.send(refusal)
            with trio.move_on_after(DISMISS_SECONDS), suppress(LinkLost):
                await link.run(lambda _: None)  # it ends the connection
            return
        assert isinstance(enroll, Enroll)
        host = RemoteHost(enroll.node_rank, f"{enroll.host} ({peer})", link, self, self._draining)
        self._hosts[enroll.node_rank] = host
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        log.info("a host has joined", node_rank=enroll.node_rank, host=host.name)
        try:
            await host.run()
        finally:
            del self._hosts[enroll.node_rank]

    def _refusal(self, enroll: FromNode) -> Refused | None:
        if not isinstance(enroll, Enroll):
            return Refused("it did not say which host it is", True)
        if enroll.nnodes != self._config.nnodes:
            return Refused(f"--nnodes {enroll.nnodes} there, --nnodes {self._config.nnodes} here", True)
        if enroll.silence != self._config.node_timeout:  # signs of life come as often as one's own wants
            here = self._config.node_timeout
            return Refused(f"--node-timeout {enroll.silence:g} there, --node-timeout {here:g} here", True)
        if not 0 < enroll.node_rank < enroll.nnodes:
            return Refused(f"--node-rank {enroll.node_rank} is none of --nnodes {enroll.nnodes}", True)
        if former := self._hosts.get(enroll.node_rank):
            return Refused(f"--node-rank {enroll.node_rank} is taken by {former.name}", False)
        return None

    def host(self, node: int) -> RemoteHost | None:
        """Return the host of that index, if it is there."""
        return self._hosts.get(node)


class RemoteHost:
    """Another host, at the end of a link.

    Args:
        nodes: finds the other hosts, for the streams between two of them.
        draining: see `Nodes`.
    """

    def __init__(
        self, node: int, name: str, link: Link[FromNode], nodes: Nodes, draining: Callable[[], bool]
    ) -> None:
        self.name = name
        self.streams = LinkedStreams(link.send)
        self._node, self._link, self._nodes, self._draining = node, link, nodes, draining
        self._workers: dict[int, RemoteWorker] = {}
        self._questions: dict[int, tuple[trio.Event, list[Found]]] = {}
        self._numbers = itertools.count(1)
        self._stream_numbers = itertools.count(1, 2)  # the agent takes the even ones
        self._nursery: trio.Nursery
        self._scope = trio.CancelScope(shield=True)
        self._cause = ""

    # --- its life ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Talk with the agent until the link is lost; if this is cancelled, dismiss it.

        Raises:
            LinkLost: it is.
        """
        self._link.send(Enlist())
        try:
            await self._talk()
        finally:
            for worker in self._workers.values():
                worker.link_lost(f"is on {self.name}, which {self._cause or 'was left'}")
            for event, _ in self._questions.values():
                event.set()

    async def _talk(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._dismiss_when_cancelled)
                with self._scope:
                    async with trio.open_nursery() as self._nursery:
                        await self._converse()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_cause(group) from None

    async def _converse(self) -> None:
        try:
            await self._link.run(self._take)
        except LinkLost as error:
            self._cause = self._cause or str(error)
            raise

    async def _dismiss_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._cause = self._cause or "was dismissed, as the engine stopped"
            self._link.send(Dismiss())
            self._scope.deadline = trio.current_time() + DISMISS_SECONDS

    async def _let_go(self) -> None:
        """Dismiss an agent that wants to leave, unless the engine needs its workers to drain."""
        log.info("a host wants to leave", host=self.name)
        await trio.sleep(LEAVE_SECONDS)
        if not self._draining():
            self._link.send(Dismiss())

    # --- workers -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open_worker(self, spec: WorkerSpec) -> AsyncIterator[Transport]:
        """Start a worker there; leaving the context has the agent kill and reap it."""
        number = next(self._numbers)
        worker = RemoteWorker(number, spec, self._link.send, self._adapt, self.name)
        self._workers[number] = worker
        try:
            self._link.send(OpenWorker(number, spec.rank, spec.runner, spec.cpu_threads, spec.alone))
            await worker.opened.wait()
            worker.check()
            yield worker
        finally:
            del self._workers[number]
            self._link.send(CloseWorker(number))

    async def _adapt(self, worker: RemoteWorker, message: Start | Prepare) -> Start | Prepare:
        """Return a start with the model's path on that host, and with the rendezvous in reach."""
        found = await self._find_model(worker, message.config)
        message = msgspec.structs.replace(message, model_path=found.model_path)
        if isinstance(message, Prepare):
            return message
        message = msgspec.structs.replace(message, tokenizer_path=found.tokenizer_path)
        if worker.spec.rank.rank == 0 or worker.spec.meets_on == worker.spec.node:
            return message
        worker.rendezvous_port = int(message.rank.rendezvous.rpartition(":")[2])
        self._link.send(OpenTunnel(worker.number))
        await worker.tunnel.wait()
        worker.check()
        place = msgspec.structs.replace(message.rank, rendezvous=f"{LOOPBACK}:{worker.tunnel_port}")
        return msgspec.structs.replace(message, rank=place)

    async def _find_model(self, worker: RemoteWorker, config: EngineConfig) -> Found:
        """Have the agent find the model's files.

        Raises:
            ModelError, ConfigError: they are not there; names the host.
            WorkerLost: the host is lost.
        """
        number = next(self._numbers)
        answered, answers = self._questions[number] = (trio.Event(), [])
        self._link.send(FindModel(number, config))
        try:
            await answered.wait()
        finally:
            del self._questions[number]
        worker.check()
        if not answers:
            raise WorkerLost(worker.name, f"is on {self.name}, which {self._cause or 'was lost'}")
        (found,) = answers
        if found.failure is None:
            return found
        kind, text = getattr(errors, found.failure[0], None), f"{self.name}: {found.failure[1]}"
        if isinstance(kind, type) and issubclass(kind, (ModelError, ConfigError)):
            error = kind.__new__(kind)  # its constructor would build the message a second time
            error.args = (text,)
            raise error
        raise WorkerLost(worker.name, f"found no model on {text}")

    # --- messages ------------------------------------------------------------------------------------------

    def _take(self, message: FromNode) -> None:
        match message:
            case Beat():
                for number, worker in self._workers.items():
                    worker.is_suspended = number in message.suspended
            case StreamData():
                self.streams.take(message)
            case Found():
                if waiting := self._questions.get(message.question):
                    waiting[1].append(message)
                    waiting[0].set()
            case Leaving():
                self._nursery.start_soon(self._let_go)
            case StreamOpened():
                self._open_stream(message)
            case Opened() | FromNodeWorker() | NodeWorkerLost() | WorkerStopped() | TunnelOpen():
                if message.worker in self._workers:  # else it was closed meanwhile
                    _hand_over(self._workers[message.worker], message)
            case _:
                raise LinkLost(f"sent a {type(message).__name__} out of turn")

    def _open_stream(self, message: StreamOpened) -> None:
        """Connect one end of a tunnel with the rendezvous, on this host or on a third one."""
        linked = self.streams.open(message.stream)
        worker = self._workers.get(message.worker)
        if worker is None:
            return linked.close()
        if worker.spec.meets_on == 0:
            return self._nursery.start_soon(connect_loopback, linked, worker.rendezvous_port)
        other = self._nodes.host(worker.spec.meets_on)
        if other is None:
            return linked.close()
        self._nursery.start_soon(splice, linked, other.connect(worker.rendezvous_port))

    def connect(self, port: int) -> LinkedStream:
        """Return a stream to a port of that host's loopback."""
        number = next(self._stream_numbers)
        stream = self.streams.open(number)
        self._link.send(ConnectStream(number, port))
        return stream


def _hand_over(
    worker: RemoteWorker, message: Opened | FromNodeWorker | NodeWorkerLost | WorkerStopped | TunnelOpen
) -> None:
    match message:
        case FromNodeWorker():
            worker.take_frame(message.frame)
        case Opened():
            if message.failure:
                worker.lost(f"cannot be started on {worker.host}: {message.failure}")
            worker.opened.set()
        case NodeWorkerLost():
            worker.lost(message.cause, message.stderr_tail)
        case WorkerStopped():
            worker.take_report(message)
        case TunnelOpen():
            worker.tunnel_port = message.port
            worker.tunnel.set()
