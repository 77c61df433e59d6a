"""KV handed over between replicas: with roles, and at planned moves. Every text is what it would be alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import STEP, Open, collect, tokens_of
from ullm.engine import Engine
from ullm.protocol.messages import ExportBlocks, ImportBlocks, Step, ToWorker
from ullm.sampling import SamplingParams
from ullm.testing import (
    FakeBehaviour,
    FakeWorkers,
    ScriptedSettings,
    local_model,
    scripted_tokens,
    write_scripted_model,
)

LONG = [300 + number % 50 for number in range(400)]
PARAMS = SamplingParams(temperature=0, max_tokens=12)
APART = {"replicas": 2, "roles": ("prefill", "decode"), "prefill_threshold": 200, "max_restarts": 9}


def expected(model: Path, prompt: list[int] = LONG, params: SamplingParams = PARAMS) -> list[int]:
    """What a model's text is, wherever it is computed."""
    return scripted_tokens(prompt, params, params.max_tokens or 0, ScriptedSettings.read(str(model)))


def computed_by(workers: FakeWorkers, replica: int) -> int:
    """Return how many positions a replica's workers have computed."""
    steps = [
        message
        for worker in workers.started
        if worker.spec.rank.replica == replica
        for message in worker.received
        if isinstance(message, Step)
    ]
    return sum(row.count for step in steps for row in step.scheduled)


def kinds(workers: FakeWorkers, replica: int) -> list[str]:
    """Return the names of the messages about blocks that a replica's workers got, in order."""
    return [
        type(message).__name__
        for worker in workers.started
        if worker.spec.rank.replica == replica
        for message in worker.received
        if isinstance(message, ExportBlocks | ImportBlocks)
    ]


def outcomes(engine: Engine) -> dict[str, int]:
    """Return what became of hand-overs."""
    return engine.statistics().handovers_total


async def test_a_long_prompt_is_computed_by_one_replica_and_decoded_by_the_other(
    clock: MockClock, opened: Open, model: Path
) -> None:
    async with opened(**APART) as (engine, workers):
        assert tokens_of(await collect(engine, LONG, PARAMS)) == expected(model)
        statistics = engine.statistics()
        assert [replica.role for replica in engine.health().replicas] == ["prefill", "decode"]
    assert statistics.handovers_total == {"moved": 1}
    assert statistics.handover_blocks_total == 400 // 16
    assert statistics.handover_bytes_total == 400 // 16 * 16 * 8
    assert (kinds(workers, 0), kinds(workers, 1)) == (["ExportBlocks"], ["ImportBlocks"])
    assert (
        computed_by(workers, 1) < 16 + PARAMS.max_tokens
    )  # less than a block of what the other one computed
    assert statistics.requests_resumed_total == statistics.tokens_resubmitted_total == 0


async def test_short_prompts_and_cached_ones_skip_it(clock: MockClock, opened: Open, model: Path) -> None:
    short = LONG[:199]
    async with opened(**APART) as (engine, workers):
        assert tokens_of(await collect(engine, short, PARAMS)) == expected(model, short)
        grown = [*short, *LONG[:150]]  # of which most is cached where it decodes
        assert tokens_of(await collect(engine, grown, PARAMS)) == expected(model, grown)
        assert outcomes(engine) == {}
    assert computed_by(workers, 0) == 0


async def test_prompt_log_probabilities_are_computed_where_they_decode(
    clock: MockClock, opened: Open
) -> None:
    """They cannot use a cache, so moving would compute them twice."""
    async with opened(**APART) as (engine, workers):
        await collect(engine, LONG, SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1))
        assert outcomes(engine) == {}
    assert computed_by(workers, 0) == 0


async def test_salts_are_kept_apart(clock: MockClock, opened: Open, model: Path) -> None:
    """What was handed over for one salt is of no use to another one."""
    async with opened(**APART) as (engine, workers):
        for salt in ("a", "b"):
            params = SamplingParams(temperature=0, max_tokens=12, cache_salt=salt)
            assert tokens_of(await collect(engine, LONG, params)) == expected(model)
        assert outcomes(engine) == {"moved": 2}
    assert computed_by(workers, 0) >= 800


def on_kth(kind: type[ToWorker], replica: int) -> Callable[[object], FakeBehaviour]:
    """Have the first worker of a replica die when it gets a message."""

    def behaviour(spec: object) -> FakeBehaviour:
        rank = spec.rank  # type: ignore[attr-defined]
        if (rank.replica, rank.epoch) != (replica, 1):
            return FakeBehaviour(step_seconds=STEP)
        return FakeBehaviour(step_seconds=STEP, die_on=lambda message: isinstance(message, kind))

    return behaviour


@pytest.mark.parametrize(
    ("kind", "replica"), [(ExportBlocks, 0), (ImportBlocks, 1)], ids=["exporting", "importing"]
)
async def test_the_loss_of_either_side_amid_a_hand_over(
    clock: MockClock, opened: Open, model: Path, kind: type[ToWorker], replica: int
) -> None:
    async with opened(on_kth(kind, replica), **APART) as (engine, workers):
        assert tokens_of(await collect(engine, LONG, PARAMS)) == expected(model)
        found = outcomes(engine)
        assert engine.statistics().worker_restarts_total == 1
    assert found["lost"] == 1
    del workers


@pytest.mark.parametrize("replica", [0, 1])
@pytest.mark.parametrize("when", [0.5, 1.5, 2.5, 4.5, 6.5])
async def test_the_loss_of_either_side_at_any_step(
    clock: MockClock, opened: Open, model: Path, replica: int, when: float
) -> None:
    async with opened(**APART) as (engine, workers), trio.open_nursery() as nursery:
        outputs = []

        async def ask() -> None:
            outputs.append(tokens_of(await collect(engine, LONG, PARAMS)))

        nursery.start_soon(ask)
        await trio.sleep(when * STEP)
        workers.started[replica].die("was killed by SIGKILL")
    assert outputs == [expected(model)]


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("handover.chunk:drop", "lost"),
        ("handover.chunk:corrupt", "refused"),
        ("worker.export:crash", "lost"),
        ("worker.import:crash", "lost"),
        ("worker.import:raise", "lost"),
        ("frame.to_worker:corrupt@message=ImportBlocks", "lost"),
        ("frame.from_worker:drop@message=BlocksExported", "late"),
        ("frame.from_worker:duplicate@message=BlocksExported", "moved"),
        ("frame.to_worker:duplicate@message=ImportBlocks", "moved"),
        ("handover.chunk:delay@seconds=2", "moved"),
        ("handover.chunk:delay@seconds=20", "late"),
    ],
)
async def test_faults_of_a_hand_over_cost_only_the_copy(
    clock: MockClock, opened: Open, model: Path, fault: str, outcome: str
) -> None:
    params = SamplingParams(temperature=0, max_tokens=25)
    async with opened(faults=fault, **APART) as (engine, _):
        assert tokens_of(await collect(engine, LONG, params)) == expected(model, params=params)
        assert outcomes(engine)[outcome] >= 1
        assert len(engine.faults.history) == 1


async def test_without_room_a_request_stays_where_its_prompt_was_computed(
    clock: MockClock, opened: Open, model: Path
) -> None:
    """The replica for decode has its hands full; the other one decodes as well."""
    crowd = [[500 + number, *range(3, 153)] for number in range(3)]
    options = APART | {"num_blocks": 32}
    async with opened(**options) as (engine, workers), trio.open_nursery() as nursery:
        outputs = {}

        async def ask(name: str, prompt: list[int], count: int) -> None:
            params = SamplingParams(temperature=0, max_tokens=count)
            outputs[name] = tokens_of(await collect(engine, prompt, params)) == expected(
                model, prompt, params
            )

        for number, prompt in enumerate(crowd):
            nursery.start_soon(ask, f"short {number}", prompt, 10)
        await trio.sleep(1.5 * STEP)
        nursery.start_soon(ask, "long", LONG, 12)
        await trio.sleep(2.5 * STEP)
        assert outcomes(engine) == {"full": 1}
    assert set(outputs.values()) == {True}
    assert len(outputs) == 4
    assert kinds(workers, 1) == []


async def test_a_request_moves_on_when_its_replica_for_decode_is_back(
    clock: MockClock, opened: Open, model: Path
) -> None:
    slow = FakeBehaviour(step_seconds=STEP, load_seconds=3 * STEP)
    async with opened(slow, **APART) as (engine, workers), trio.open_nursery() as nursery:
        outputs = []

        async def ask() -> None:
            outputs.append(tokens_of(await collect(engine, LONG, PARAMS)))

        workers.started[1].die("was killed by SIGKILL")
        await trio.sleep(0.1)
        nursery.start_soon(ask)
        await trio.sleep(2.5 * STEP)
        assert outcomes(engine) == {}  # there is nowhere to go
        assert engine._router.load(0) == 1
        await trio.sleep(3 * STEP)
        assert outcomes(engine) == {"moved": 1}
        assert engine._router.load(1) == 1
    assert outputs == [expected(model)]


async def test_two_ranks_hand_over_to_two_ranks(clock: MockClock, opened: Open, model: Path) -> None:
    async with opened(tp_size=2, **APART) as (engine, workers):
        assert tokens_of(await collect(engine, LONG, PARAMS)) == expected(model)
        assert outcomes(engine) == {"moved": 1}
        assert engine.statistics().handover_blocks_total == 2 * 25
    assert kinds(workers, 1) == ["ImportBlocks"] * 2


async def test_a_stop_ends_hand_overs_with_their_requests(
    clock: MockClock, opened: Open, model: Path
) -> None:
    """Requests run to their end in a drain, and move meanwhile."""
    async with opened(faults="handover.chunk:delay@seconds=2", **APART) as (engine, _):
        async with trio.open_nursery() as nursery:
            outputs = []

            async def ask() -> None:
                outputs.append(tokens_of(await collect(engine, LONG, PARAMS)))

            nursery.start_soon(ask)
            await trio.sleep(1.5 * STEP)
            report = await engine.shutdown(60)
        assert outputs == [expected(model)]
        assert (report.drained, report.aborted) == (1, 0)
        assert outcomes(engine) == {"moved": 1}


# --- planned moves --------------------------------------------------------------------------------


async def reload_amid(engine: Engine, params: SamplingParams, model: str | None = None) -> list[int]:
    """Reload while a request is computed; return its tokens."""
    outputs: list[int] = []

    async def ask() -> None:
        outputs.extend(tokens_of(await collect(engine, LONG, params)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(3.5 * STEP)
        await engine.reload(model)
    return outputs


@pytest.mark.parametrize("handover", [True, False])
async def test_a_reload_of_the_same_weights_moves_requests_with_their_kv(
    clock: MockClock, opened: Open, model: Path, handover: bool
) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    async with opened(shutdown_timeout=2.0, kv_handover=handover) as (engine, workers):
        assert await reload_amid(engine, params) == expected(model, params=params)
        assert outcomes(engine) == ({"moved": 1} if handover else {})
        assert engine.statistics().requests_resumed_total == (0 if handover else 1)
    if handover:
        assert computed_by(workers, 1) < 16 + 20
    else:
        assert computed_by(workers, 1) > 400


async def test_kv_of_other_weights_is_never_used(
    clock: MockClock, opened: Open, model: Path, tmp_path: Path
) -> None:
    """The same tokenizer, another script: its tokens differ, and so would its KV."""
    other = write_scripted_model(tmp_path / "other", first_token=4)
    params = SamplingParams(temperature=0, max_tokens=20)
    find = lambda config: local_model(Path(config.model))  # noqa: E731
    async with opened(find_model=find, shutdown_timeout=2.0) as (engine, workers):
        tokens = await reload_amid(engine, params, str(other))
        assert outcomes(engine) == {"identity": 1}
        assert engine.statistics().handover_blocks_total == 0
    before = expected(model, params=params)
    moved_at = next(
        index for index, pair in enumerate(zip(tokens, before, strict=True)) if pair[0] != pair[1]
    )
    rest = SamplingParams(temperature=0, max_tokens=20 - moved_at)
    assert tokens[moved_at:] == expected(other, [*LONG, *tokens[:moved_at]], rest)
    assert kinds(workers, 0) == kinds(workers, 1) == []


async def test_a_stop_of_a_replica_waits_for_its_transfers(
    clock: MockClock, opened: Open, model: Path
) -> None:
    """Its requests are gone within the time for that; what takes longer is computed again."""
    params = SamplingParams(temperature=0, max_tokens=40)
    for seconds, outcome in ((5, "moved"), (50, "late")):
        fault = f"handover.chunk:delay@seconds={seconds}"
        async with opened(shutdown_timeout=2.0, faults=fault) as (engine, _):
            assert await reload_amid(engine, params) == expected(model, params=params)
            assert outcomes(engine) == {outcome: 1}
