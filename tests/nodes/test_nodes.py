"""An engine whose second replica is on another host, by an agent in this process, over a real connection."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.engine import collect
from tests.support.link_files import make_link_files
from ullm.config import EngineConfig
from ullm.engine import Engine, open_engine
from ullm.errors import ConfigError, ServerUnreachable
from ullm.nodes.agent import Agent
from ullm.sampling import SamplingParams
from ullm.testing import FakeBehaviour, FakeWorkers, local_model

RUNNER = "ullm.testing:ScriptedRunner"
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
SILENCE = 1.0
"""Seconds after which a silent host is lost, in these tests."""


class Cluster:
    """A port, a secret, and the configurations of two hosts."""

    def __init__(self, model: Path, folder: Path, port: int) -> None:
        self.model, self.port = model, port
        self.secret = folder / "secret"
        self.secret.write_text(secrets.token_hex(16))
        self.secret.chmod(0o600)
        self.here = FakeWorkers(FakeBehaviour(step_seconds=0.002))
        self.there = FakeWorkers(FakeBehaviour(step_seconds=0.002))

    def config(self, **options: Any) -> EngineConfig:
        usual = {"nnodes": 2, "replicas": 2, "node_secret_file": str(self.secret), "node_timeout": SILENCE}
        options = {**usual, "nccl_port": self.port, "transport": "fake", **options}
        return EngineConfig(model=str(self.model), runner=RUNNER, **options)

    @asynccontextmanager
    async def engine(self, **options: Any) -> AsyncIterator[Engine]:
        config = self.config(**options)
        find = partial(self._find)
        async with open_engine(config, transport=self.here.open, find_model=find) as engine:
            yield engine

    def agent(self, find_model: Callable[[EngineConfig], Any] | None = None, **options: Any) -> Agent:
        config = self.config(**{"node_rank": 1, **options})
        return Agent(config, find_model or self._find, self.there.open)

    def _find(self, config: EngineConfig) -> Any:
        return local_model(self.model)


@pytest.fixture
async def cluster(model: Path, tmp_path: Path) -> Cluster:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    return Cluster(model, tmp_path, port)


class Cable:
    """A proxy between agent and engine that can be cut, or fall silent."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._connections: list[trio.CancelScope] = []
        self._flowing = trio.Event()
        self._flowing.set()

    async def run(self, task_status: trio.TaskStatus[int]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listener.socket.getsockname()[1])
        await trio.serve_listeners(self._carry, [listener])

    def cut(self) -> None:
        for scope in self._connections:
            scope.cancel()

    def silence(self) -> None:
        self._flowing = trio.Event()

    def restore(self) -> None:
        self._flowing.set()

    async def _carry(self, near: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            self._connections.append(scope)
            try:
                async with near, await trio.open_tcp_stream("127.0.0.1", self._to) as far:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._pump, near, far, scope)
                        nursery.start_soon(self._pump, far, near, scope)
            except (OSError, trio.BrokenResourceError):
                return

    async def _pump(self, a: trio.SocketStream, b: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            async for data in a:
                await self._flowing.wait()
                await b.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110  # over two programs
            await trio.sleep(0.01)


async def texts(engine: Engine, count: int = 4) -> list[list[int]]:
    """Ask several things at the same time, so that both replicas have some."""
    found: dict[int, list[int]] = {}

    async def one(number: int) -> None:
        outputs = await collect(engine, [300 + number], LONG)
        found[number] = [token for output in outputs for token in output.token_ids]

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)
    return [found[number] for number in range(count)]


def steps(workers: FakeWorkers) -> int:
    return len(workers.started)


async def test_replicas_on_two_hosts(cluster: Cluster) -> None:
    async with trio.open_nursery() as nursery:
        joined: list[str] = []
        nursery.start_soon(cluster.agent().run, joined.append)
        async with cluster.engine() as engine:
            assert (steps(cluster.here), steps(cluster.there)) == (1, 1)
            both = await texts(engine)
            assert both == await texts(engine)
            assert all(len(tokens) == LONG.max_tokens for tokens in both)
        assert joined == [f"127.0.0.1:{cluster.port}"]
        # The agent is dismissed with the engine's end, or this would never be reached.


async def test_hosts_with_certificates_of_one_authority(cluster: Cluster, tmp_path: Path) -> None:
    options = make_link_files(tmp_path / "link").options()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.agent(**options).run)
        async with cluster.engine(**options) as engine:
            assert all(len(tokens) == LONG.max_tokens for tokens in await texts(engine))
            assert steps(cluster.there) == 1


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("other", "does not accept this one's certificate (unknown ca)"),
        ("untrusted", "the other end's certificate is not accepted: "),
    ],
)
async def test_a_host_whose_certificate_does_not_fit_is_told(
    cluster: Cluster, tmp_path: Path, kind: str, says: str
) -> None:
    ours, others = (make_link_files(tmp_path / name) for name in ("ours", "others"))
    theirs = others.options(ours.authority if kind == "other" else None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_serve_until_cancelled, cluster, ours.options())
        with pytest.raises(ConfigError, match="do not let each other in") as raised:
            await cluster.agent(**theirs).run()
        assert says in str(raised.value)
        nursery.cancel_scope.cancel()


async def _serve_until_cancelled(cluster: Cluster, options: dict[str, str]) -> None:
    async with cluster.engine(**options):
        await trio.sleep_forever()


@pytest.mark.parametrize("way", ["cut", "silence"])
async def test_a_host_that_is_lost_costs_a_pause(cluster: Cluster, way: str) -> None:
    async with trio.open_nursery() as nursery:
        cable = Cable(cluster.port)
        port = await nursery.start(cable.run)
        nursery.start_soon(cluster.agent(nccl_port=port).run)
        async with cluster.engine() as engine:
            undisturbed = await texts(engine)
            async with trio.open_nursery() as asking:
                found: list[list[list[int]]] = []

                async def ask() -> None:
                    found.append(await texts(engine))

                asking.start_soon(ask)
                await trio.sleep(0.05)
                former = cluster.there.started[-1]
                cable.cut() if way == "cut" else cable.silence()
                await until(lambda: not former.alive())
            assert found == [undisturbed]
            cable.restore()
            await until(lambda: len(cluster.there.started) == 2 and cluster.there.started[-1].alive())
            await until(lambda: all(replica.up for replica in engine.health().replicas))
            assert await texts(engine) == undisturbed
        nursery.cancel_scope.cancel()


async def test_an_agent_that_is_killed_and_started_again(cluster: Cluster) -> None:
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await cluster.agent().run()

        nursery.start_soon(first)
        async with cluster.engine() as engine:
            undisturbed = await texts(engine)
            scope.cancel()
            assert await texts(engine) == undisturbed
            nursery.start_soon(cluster.agent().run)
            await until(lambda: all(replica.up for replica in engine.health().replicas))
            assert await texts(engine) == undisturbed


async def test_a_second_agent_of_the_same_rank_waits_for_the_place(cluster: Cluster) -> None:
    async with trio.open_nursery() as nursery:
        first, joined = trio.CancelScope(), list[str]()

        async def run() -> None:
            with first:
                await cluster.agent().run()

        nursery.start_soon(run)
        async with cluster.engine() as engine:
            undisturbed = await texts(engine)
            with pytest.raises(ServerUnreachable, match="--node-rank 1 is taken by "):
                await cluster.agent(start_timeout=0.5).run()
            nursery.start_soon(cluster.agent().run, joined.append)
            first.cancel()
            await until(lambda: joined)
            assert await texts(engine) == undisturbed


async def test_an_agent_leaves_at_once_unless_the_engine_drains(cluster: Cluster) -> None:
    async with trio.open_nursery() as nursery:
        agent, gone = cluster.agent(), trio.Event()

        async def run() -> None:
            await agent.run()
            gone.set()

        nursery.start_soon(run)
        async with cluster.engine() as engine:
            undisturbed = await texts(engine)
            async with trio.open_nursery() as asking:
                asking.start_soon(texts, engine)
                agent.leave()
                with trio.fail_after(5):
                    await gone.wait()
            second = cluster.agent()
            nursery.start_soon(second.run)
            await until(lambda: all(replica.up for replica in engine.health().replicas))
            running: list[list[list[int]]] = []

            async def ask() -> None:
                running.append(await texts(engine))

            nursery.start_soon(ask)
            await trio.sleep(0.05)
            worker = cluster.there.started[-1]
            engine.request_shutdown()
            second.leave()
            await engine.wait_stopped()
            await until(lambda: running)
            assert running == [undisturbed]
            assert not worker.alive()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nnodes": 3, "replicas": 3}, "--nnodes 3 there, --nnodes 2 here"),
        ({"node_timeout": 9}, "--node-timeout 9 there, --node-timeout 1 here"),
    ],
)
async def test_a_host_that_does_not_belong_is_told(
    cluster: Cluster, options: dict[str, Any], says: str
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.agent().run)
        async with cluster.engine() as engine:
            with pytest.raises(ConfigError, match=says):
                await cluster.agent(**options).run()
            assert len(await texts(engine)) == 4


async def test_another_secret_is_refused_and_nothing_happens(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("t" * 32)
    other.chmod(0o600)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.agent().run)
        async with cluster.engine() as engine:
            with pytest.raises(ConfigError, match="do not let each other in: the secrets differ"):
                await cluster.agent(node_secret_file=str(other)).run()
            assert len(await texts(engine)) == 4


@pytest.mark.parametrize(
    "garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\x02\x00\xc0\xc0", b"\x00\x00"]
)
async def test_strangers_at_the_port(cluster: Cluster, garbage: bytes) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.agent().run)
        async with cluster.engine() as engine:
            for _ in range(20):
                stream = await trio.open_tcp_stream("127.0.0.1", cluster.port)
                with suppress(trio.BrokenResourceError):  # it has been let go already
                    await stream.send_all(garbage or b"x")
                await stream.aclose()
            silent = [await trio.open_tcp_stream("127.0.0.1", cluster.port) for _ in range(30)]
            assert len(await texts(engine)) == 4
            for stream in silent:
                await stream.aclose()


async def test_a_model_that_is_not_there_is_said_with_the_host(cluster: Cluster) -> None:
    from ullm.errors import ModelNotFound

    def find(config: EngineConfig) -> Any:
        raise ModelNotFound("no such folder: /models/x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.agent(find).run)
        with pytest.raises(ModelNotFound, match=r"\(127\.0\.0\.1\): no such folder: /models/x"):
            async with cluster.engine():
                pytest.fail("started")
        nursery.cancel_scope.cancel()


async def test_no_engine(cluster: Cluster) -> None:
    with pytest.raises(ServerUnreachable, match=r"no engine for 0\.5 s"):
        await cluster.agent(start_timeout=0.5).run()


async def test_the_engine_comes_later(cluster: Cluster) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.agent().run)
        await trio.sleep(0.3)
        async with cluster.engine() as engine:
            assert len(await texts(engine)) == 4


async def test_an_engine_belongs_to_the_first_host(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="the engine is on the host of --node-rank 0"):
        Engine(cluster.config(node_rank=1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"node_rank": 2}, "--node-rank 2 must be from 0 to 1"),
        ({"nnodes": 3}, "--nnodes 3: there are only 2"),
        ({"node_secret_file": None}, "--nnodes needs --node-secret-file"),
        ({"transport": "thread"}, "--nnodes needs --transport process, not thread"),
        ({"nnodes": 1, "node_rank": 1}, "--node-rank 1 needs --nnodes"),
    ],
)
async def test_combinations_that_cannot_be(cluster: Cluster, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cluster.config(**options)
