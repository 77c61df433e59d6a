"""Several replicas under one router: where requests go, how often they move, and who is on trial."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import STEP, Open, collect, tokens_of
from ullm.engine import Engine
from ullm.errors import MigrationLimitReached, RequestPoisoned
from ullm.sampling import SamplingParams
from ullm.testing import FakeBehaviour, FakeWorkers, ScriptedSettings, scripted_tokens

LONG = [300 + number % 50 for number in range(400)]
GREEDY = SamplingParams(temperature=0, max_tokens=10)


def kill(workers: FakeWorkers, replica: int) -> None:
    """Kill the worker of a replica."""
    workers_of = [worker for worker in workers.started if worker.spec.rank.replica == replica]
    workers_of[-1].die("was killed by SIGKILL")


async def cached(engine: Engine, prompt: list[int], session: str = "") -> int:
    """Generate; return how many tokens of the prompt came from the cache."""
    async with engine.generate(prompt, GREEDY, session=session) as generation:
        outputs = [output async for output in generation]
    return outputs[0].num_cached_tokens


@pytest.mark.parametrize("policy", ["prefix", "round-robin", "least-loaded"])
async def test_only_prefixes_are_found_again_on_every_turn(
    clock: MockClock, opened: Open, policy: str
) -> None:
    """Three chats of four turns in turn, on two replicas."""
    async with opened(replicas=2, routing=policy) as (engine, _):
        found = [
            await cached(engine, [chat * 10 + 3, *LONG[: 100 * turn]])
            for turn in range(1, 5)
            for chat in range(3)
        ]
        routed = engine.statistics().requests_routed_total
    again = found[3:]  # after each chat's first turn
    if policy == "prefix":
        assert all(again)
        assert routed == {"load": 3, "prefix": 9}
    elif policy == "round-robin":
        assert again[:3] == [0, 0, 0]  # the third request after a chat's last one goes elsewhere
        assert routed == {"turn": 12}
    else:
        assert routed == {"load": 12}


async def test_a_session_is_found_on_its_replica(clock: MockClock, opened: Open) -> None:
    async with opened(replicas=2, routing="round-robin") as (engine, _):
        assert await cached(engine, LONG, "a") == 0
        assert await cached(engine, LONG, "b") == 0  # on the other one
        assert await cached(engine, LONG, "a") == 384
        assert engine.statistics().requests_routed_total == {"turn": 2, "session": 1}


async def test_a_resumed_request_finds_its_prefix(clock: MockClock, opened: Open, model: Path) -> None:
    """Of two survivors the one that has the prompt cached takes over."""
    async with opened(replicas=3) as (engine, workers), trio.open_nursery() as nursery:
        outputs = []

        async def ask(prompt: list[int]) -> None:
            outputs.append(tokens_of(await collect(engine, prompt, GREEDY)))

        nursery.start_soon(ask, LONG)
        await trio.sleep(1.5 * STEP)
        first = next(replica for replica in range(3) if engine._router.load(replica))
        nursery.start_soon(ask, LONG)  # to the same one, which is about to have it
        await trio.sleep(2 * STEP)
        assert engine._router.load(first) == 2
        kill(workers, first)
        await trio.sleep(1.5 * STEP)
        loads = [engine._router.load(replica) for replica in range(3)]
        assert sorted(loads) == [0, 0, 2]  # one prefill for both
    expected = scripted_tokens(LONG, GREEDY, 10, ScriptedSettings.read(str(model)))
    assert outputs == [expected, expected]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("limit", [0, 1, None])
async def test_beyond_its_limit_of_migrations_a_request_ends(
    clock: MockClock, opened: Open, model: Path, replicas: int, limit: int | None
) -> None:
    losses = 2
    async with opened(replicas=replicas, migration_limit=limit, max_restarts=9) as (engine, workers):
        outputs, failures = [], []

        async def ask() -> None:
            try:
                outputs.append(tokens_of(await collect(engine, LONG, SamplingParams(max_tokens=40, seed=1))))
            except (MigrationLimitReached, RequestPoisoned) as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            for _ in range(losses):
                await trio.sleep(8.5 * STEP)
                for replica in range(replicas):
                    if engine._router.load(replica):
                        kill(workers, replica)
        if limit is None:
            params = SamplingParams(max_tokens=40, seed=1)
            assert outputs == [scripted_tokens(LONG, params, 40, ScriptedSettings.read(str(model)))]
        else:
            (failure,) = failures
            assert isinstance(failure, MigrationLimitReached)
            assert (failure.status, failure.code) == (503, "migration_limit")
            assert f"lost {limit + 1} time" in str(failure)
        assert engine._router.live == 0


async def test_requests_that_only_waited_may_still_migrate(clock: MockClock, opened: Open) -> None:
    async with opened(max_bs=1, migration_limit=0, max_restarts=9) as (engine, workers):
        outcomes: list[str] = []

        async def ask(name: str) -> None:
            try:
                await collect(engine, [300, 301], GREEDY)
                outcomes.append(f"{name} done")
            except MigrationLimitReached:
                outcomes.append(f"{name} given up")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "first")
            await trio.sleep(1.5 * STEP)
            nursery.start_soon(ask, "second")
            await trio.sleep(1.5 * STEP)
            kill(workers, 0)
        assert outcomes == ["first given up", "second done"]


async def test_a_replica_that_keeps_dying_is_on_trial(clock: MockClock, opened: Open) -> None:
    """It gets one request until that one has ended; its neighbour has the others."""
    slow_start = FakeBehaviour(step_seconds=STEP, load_seconds=1.0)
    async with opened(slow_start, replicas=2, max_restarts=9) as (engine, workers):
        for _ in range(2):
            kill(workers, 1)
            await trio.sleep(0.1)
            assert engine.health().replicas[1].breaker == "open"
            while 1 not in engine._router.replicas_up:
                await engine._router.wait_changed()
        assert [replica.breaker for replica in engine.health().replicas] == ["closed", "half_open"]
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(collect, engine, [300 + number] * 3, GREEDY)
            await trio.sleep(0.5 * STEP)
            assert [engine._router.load(replica) for replica in range(2)] == [5, 1]
        assert engine.health().replicas[1].breaker == "closed"


@pytest.mark.parametrize("swap", [False, True])
async def test_a_reload_under_continuous_load_fails_no_request(
    clock: MockClock, opened: Open, model: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    """Clients that ask again as soon as they have an answer, over two reloads one after the other."""
    if swap:
        monkeypatch.setattr("ullm.engine.reload.Reloader._needs_swap", lambda self: True)
    settings = ScriptedSettings.read(str(model))
    answered, stop = 0, trio.Event()
    async with opened(replicas=3, shutdown_timeout=3 * STEP) as (engine, workers):

        async def client(number: int) -> None:
            nonlocal answered
            turn = 0
            while not stop.is_set():
                prompt, turn = [300 + number] * (20 + turn % 50), turn + 1
                expected = scripted_tokens(prompt, GREEDY, 10, settings)
                assert tokens_of(await collect(engine, prompt, GREEDY)) == expected
                answered += 1

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(client, number)
            await trio.sleep(25 * STEP)
            for _ in range(2):
                report = await engine.reload()
                await trio.sleep(25 * STEP)
            stop.set()
        assert report.replicas == [6, 7, 8]
        assert [worker.spec.rank.replica for worker in workers.started if worker.alive()] == [6, 7, 8]
        assert answered > 60
        assert engine.statistics().requests_total == {"length": answered}
