"""The engine on a virtual clock, with workers in memory that die and hang when a test says so."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.engine import PROMPT, STEP, Open, collect, tokens_of
from ullm.actors.router import Router
from ullm.actors.router_messages import Tokens
from ullm.config import EngineConfig
from ullm.engine import Engine, EngineState
from ullm.engine.output import Output
from ullm.errors import (
    EngineDead,
    EngineDraining,
    InvalidParameter,
    ModelFileBroken,
    PromptTooLong,
    QueueFull,
    RequestPoisoned,
)
from ullm.hub import LocalModel
from ullm.protocol.messages import Sampled, Step, StepResult, Stop, ToWorker
from ullm.sampling import SamplingParams
from ullm.supervision import ChildSpec
from ullm.testing import (
    FakeBehaviour,
    FakeWorkers,
    ScriptedSettings,
    local_model,
    scripted_tokens,
    write_scripted_model,
)

GREEDY = SamplingParams(temperature=0, max_tokens=10)


# --- generating --------------------------------------------------------------------------------------


async def test_tokens_come_one_by_one_and_end_with_a_reason(
    clock: MockClock, opened: Open, script: ScriptedSettings
) -> None:
    async with opened() as (engine, _):
        outputs = await collect(engine)
    assert tokens_of(outputs) == scripted_tokens(PROMPT, GREEDY, 10, script)
    assert [output.finish_reason for output in outputs] == [None] * 9 + ["length"]
    assert outputs[-1].num_prompt_tokens == 3
    assert outputs[-1].num_generated_tokens == 10


async def test_choices_differ_and_are_interleaved(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, _):
        outputs = await collect(engine, params=SamplingParams(n=3, seed=1, max_tokens=6))
    texts = {tuple(tokens_of(outputs, index)) for index in range(3)}
    assert len(texts) == 3
    assert {output.index for output in outputs[:3]} == {0, 1, 2}


async def test_the_same_seed_gives_the_same_text_whatever_else_runs(clock: MockClock, opened: Open) -> None:
    params = SamplingParams(seed=7, max_tokens=8)
    results: list[list[Output]] = []

    async def one(prompt: list[int], params: SamplingParams) -> None:
        results.append(await collect(engine, prompt, params))

    async with opened() as (engine, _):
        alone = await collect(engine, params=params)
        async with trio.open_nursery() as nursery:
            for other in range(5):
                nursery.start_soon(one, [400 + other], SamplingParams(max_tokens=3 + other))
            nursery.start_soon(one, PROMPT, params)
    assert tokens_of(alone) in [tokens_of(outputs) for outputs in results]


async def test_a_stop_string_ends_the_text_across_tokens(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, _):
        text = "".join(
            output.text
            for output in await collect(engine, params=SamplingParams(temperature=0, max_tokens=30))
        )
        stop = text[10:16]
        outputs = await collect(engine, params=SamplingParams(temperature=0, max_tokens=30, stop=stop))
        await wait_all_tasks_blocked()
        assert engine.statistics().kv_blocks_used == 0
    assert "".join(output.text for output in outputs) == text[: text.index(stop)]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip", [False, True])
async def test_a_stop_string_that_is_a_special_token_stops(
    clock: MockClock, opened: Open, tmp_path: Path, include: bool, skip: bool
) -> None:
    """Both tokens of this model are special: <|im_start|>, and an end of sequence that is ignored."""
    folder = write_scripted_model(tmp_path, first_token=1, vocab_size=3)
    params = SamplingParams(
        temperature=0,
        max_tokens=40,
        stop=["x", "<|im_start|>"],
        ignore_eos=True,
        include_stop_str_in_output=include,
        skip_special_tokens=skip,
    )
    async with opened(find_model=lambda config: local_model(folder), model=str(folder)) as (engine, _):
        outputs = await collect(engine, [2, 2], params)
    assert tokens_of(outputs)[-1] == 1
    assert 1 not in tokens_of(outputs)[:-1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "<|im_start|>")
    text = "".join(output.text for output in outputs)
    assert text.endswith("<|im_start|>") == include
    assert text.count("<|im_start|>") == include


async def test_only_requests_of_the_same_salt_share_the_prefix_cache(clock: MockClock, opened: Open) -> None:
    prompt = list(range(300, 340))

    async def cached(salt: str | None) -> int:
        params = SamplingParams(temperature=0, max_tokens=2, cache_salt=salt)
        return (await collect(engine, prompt, params))[-1].num_cached_tokens

    async with opened() as (engine, _):
        assert [await cached(salt) for salt in (None, None, "a", "b", "a", None)] == [0, 32, 0, 0, 32, 32]


async def test_bad_words_reach_the_workers_as_tokens(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, workers):
        await collect(engine, params=SamplingParams(max_tokens=1, bad_words="the", allowed_token_ids=[300]))
        (new,) = [
            new
            for worker in workers.started
            for message in worker.received
            if isinstance(message, Step)
            for new in message.new_sequences
        ]
        assert engine.tokenizer is not None
        words = {engine.tokenizer.decode(word) for word in new.params.bad_word_ids}
        assert words == {"the", " the"}
        assert (new.params.bad_words, new.params.allowed_token_ids) == ((), (300,))
        for field in ("allowed_token_ids", "bad_word_ids"):
            beyond = [99_999] if field == "allowed_token_ids" else [[99_999]]
            with pytest.raises(InvalidParameter, match=f"{field}: token id 99999") as caught:
                await collect(engine, params=SamplingParams(**{field: beyond}))
            assert caught.value.param == field


async def test_text_prompts_are_encoded(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, _):
        assert engine.tokenizer is not None
        prompt = await engine.tokenizer.encode("The supervisor starts")
        assert tokens_of(await collect(engine, "The supervisor starts")) == tokens_of(
            await collect(engine, prompt)
        )


@pytest.mark.parametrize(
    ("prompt", "params", "error", "match"),
    [
        ([], GREEDY, InvalidParameter, "empty"),
        ([10**6], GREEDY, InvalidParameter, "vocabulary"),
        ([5] * 64, GREEDY, PromptTooLong, "64 tokens.*64 tokens"),
        ([5] * 60, GREEDY, InvalidParameter, "at most 4"),
        ([5], SamplingParams(logit_bias={10**6: 1}), InvalidParameter, "logit_bias"),
        ([5], SamplingParams(stop_token_ids=(10**6,)), InvalidParameter, "stop_token_ids"),
    ],
)
async def test_what_cannot_be_served_is_refused_on_entering(
    clock: MockClock,
    opened: Open,
    prompt: list[int],
    params: SamplingParams,
    error: type[Exception],
    match: str,
) -> None:
    async with opened(context_len=64) as (engine, _):
        with pytest.raises(error, match=match):
            await collect(engine, prompt, params)
        assert len(await collect(engine)) == 10


async def test_a_deadline_ends_with_what_there_is(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, _):
        outputs = await collect(engine, params=SamplingParams(temperature=0, max_tokens=50, timeout=4.5))
        await wait_all_tasks_blocked()
        assert engine.statistics().running == 0
    assert outputs[-1].finish_reason == "timeout"
    assert 3 <= len(tokens_of(outputs)) <= 5


async def test_leaving_early_frees_the_blocks(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, _):
        async with engine.generate(PROMPT, GREEDY) as generation:
            await anext(generation)
            assert engine.statistics().kv_blocks_used > 0
        await wait_all_tasks_blocked()
        statistics = engine.statistics()
    assert (statistics.kv_blocks_used, statistics.running, statistics.waiting) == (0, 0, 0)
    assert statistics.requests_total == {"abort": 1}


async def test_a_full_queue_refuses_and_recovers(clock: MockClock, opened: Open) -> None:
    async with opened(max_bs=1, max_num_batched_tokens=16, max_queue=2) as (engine, _):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(collect, engine)
            await wait_all_tasks_blocked()
            with pytest.raises(QueueFull, match="max-queue"):
                await collect(engine)
        assert len(await collect(engine)) == 10


async def test_an_abort_by_name_keeps_the_tokens_so_far(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, _):
        async with engine.generate(PROMPT, GREEDY, request_id="mine") as generation:
            first = await anext(generation)
            assert engine.abort("mine")
            rest = [output async for output in generation]
        assert not engine.abort("mine")
    assert rest[-1].finish_reason == "abort"
    assert first.token_ids


# --- failing -----------------------------------------------------------------------------------------


async def run_with(
    opened: Open, fault: Callable[[Engine, FakeWorkers], Any], **options: Any
) -> list[list[int]]:
    """Four requests; the fault comes in the middle; what each one got."""
    results: dict[int, list[int]] = {}

    async def one(number: int) -> None:
        results[number] = tokens_of(await collect(engine, [300 + number, 5]))

    async with opened(**options) as (engine, workers), trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(one, number)
        await trio.sleep(4.5 * STEP)
        fault(engine, workers)
    return [results[number] for number in range(4)]


def expected(script: ScriptedSettings) -> list[list[int]]:
    return [scripted_tokens([300 + number, 5], GREEDY, 10, script) for number in range(4)]


async def test_a_dead_worker_costs_a_pause_and_no_token(
    clock: MockClock, opened: Open, script: ScriptedSettings
) -> None:
    seen: list[Engine] = []

    def fault(engine: Engine, workers: FakeWorkers) -> None:
        seen.append(engine)
        workers.started[-1].die("was killed by SIGSEGV")

    assert await run_with(opened, fault) == expected(script)
    statistics = seen[0].statistics()
    assert statistics.worker_restarts_total == 1
    assert statistics.requests_resumed_total == 4


async def test_a_hung_worker_is_replaced(clock: MockClock, opened: Open, script: ScriptedSettings) -> None:
    def fault(engine: Engine, workers: FakeWorkers) -> None:
        workers.started[-1].hang()

    assert await run_with(opened, fault, step_timeout=30.0) == expected(script)


async def test_doubled_and_foreign_results_change_nothing(
    clock: MockClock, opened: Open, script: ScriptedSettings
) -> None:
    seen: list[FakeWorkers] = []

    def fault(engine: Engine, workers: FakeWorkers) -> None:
        seen.append(workers)
        worker = workers.started[0]
        worker.emit(StepResult(10**6, [Sampled(10**6, [9])]))
        worker.emit(
            next(sent for sent in reversed(worker.sent) if isinstance(sent, StepResult) and sent.sampled)
        )

    assert await run_with(opened, fault) == expected(script)
    assert len(seen[0].started) == 1


async def test_a_failing_scheduler_is_restarted_alone(
    clock: MockClock, opened: Open, script: ScriptedSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(engine: Engine, workers: FakeWorkers) -> None:
        core = engine._fleet.replicas[0].scheduler._scheduler
        assert core is not None
        monkeypatch.setattr(core, "apply", lambda result: 1 / 0)
        fault_seen.append(workers)

    fault_seen: list[FakeWorkers] = []
    assert await run_with(opened, fault) == expected(script)
    assert len(fault_seen[0].started) == 1, "the worker lives on"


async def test_a_failing_router_is_restarted_with_its_records(
    clock: MockClock, opened: Open, script: ScriptedSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = break_router(monkeypatch, times=1)
    assert await run_with(opened, lambda engine, workers: None) == expected(script)
    assert len(failures) == 1


async def test_a_router_that_fails_again_and_again_ends_the_engine(
    clock: MockClock, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_router(monkeypatch, times=100)
    with pytest.raises(EngineDead, match="a bug in the router"):  # noqa: PT012  # on leaving
        async with opened() as (engine, _):
            with pytest.raises(EngineDead, match="a bug in the router"):
                await collect(engine)
            await engine.wait_stopped()


def break_router(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Have the router fail at tokens beyond the third, so often; the list tells how often it did."""
    take, failures = Router._take_tokens, list[int]()

    def fail(self: Router, tokens: Tokens) -> None:
        if tokens.events and tokens.events[0].index > 3 and len(failures) < times:
            failures.append(tokens.events[0].index)
            raise ValueError("a bug in the router")
        take(self, tokens)

    monkeypatch.setattr(Router, "_take_tokens", fail)
    return failures


async def test_another_replica_takes_over(clock: MockClock, opened: Open, script: ScriptedSettings) -> None:
    def fault(engine: Engine, workers: FakeWorkers) -> None:
        assert engine.health().ready
        next(w for w in workers.started if w.spec.rank.replica == 1).die("was killed by SIGKILL")

    def behaviour(spec: Any) -> FakeBehaviour:
        slow = spec.rank.replica == 1 and spec.rank.epoch > 1
        return FakeBehaviour(step_seconds=STEP, load_seconds=1000.0 if slow else 0.0)

    assert await run_with(opened, fault, behaviour=behaviour, replicas=2) == expected(script)


async def test_one_poisoned_request_fails_alone(
    clock: MockClock, opened: Open, script: ScriptedSettings
) -> None:
    def poisonous(message: ToWorker) -> bool:
        return isinstance(message, Step) and any(new.token_ids[:1] == [444] for new in message.new_sequences)

    async with opened(FakeBehaviour(step_seconds=STEP, die_on=poisonous)) as (engine, _):
        errors: list[BaseException] = []
        results: list[list[int]] = []

        async def poison() -> None:
            with pytest.raises(RequestPoisoned) as caught:
                await collect(engine, [444])
            errors.append(caught.value)

        async def neighbour() -> None:
            results.append(tokens_of(await collect(engine, PROMPT)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbour)
            nursery.start_soon(poison)
    assert len(errors) == 1
    assert results == [scripted_tokens(PROMPT, GREEDY, 10, script)]


async def test_beyond_the_restart_limit_the_engine_is_dead_with_one_cause(
    clock: MockClock, opened: Open
) -> None:
    always = FakeBehaviour(
        step_seconds=STEP, die_on=lambda message: isinstance(message, Step) and bool(message.scheduled)
    )
    with pytest.raises(EngineDead, match="SIGKILL"):  # noqa: PT012  # on leaving
        async with opened(always, max_restarts=1) as (engine, _):
            with pytest.raises(EngineDead, match="SIGKILL"):
                await collect(engine)
            with pytest.raises(EngineDead, match="SIGKILL"):
                engine.check_admission()
            report = await engine.wait_stopped()
            assert report.exit_code == 70
            assert engine.state is EngineState.FAILED


async def test_a_model_that_cannot_load_fails_the_start_with_its_own_error(
    clock: MockClock, opened: Open
) -> None:
    broken = FakeBehaviour(load_error=ModelFileBroken("model.safetensors", "it is truncated"))
    with pytest.raises(ModelFileBroken, match=r"^model[.]safetensors: it is truncated$"):
        async with opened(broken):
            pytest.fail("opened a broken model")


async def test_a_worker_that_dies_while_loading_fails_the_start(clock: MockClock, opened: Open) -> None:
    with pytest.raises(Exception, match=r"replica0[.]rank0 was killed by SIGKILL"):
        async with opened(FakeBehaviour(die_on=lambda message: True)):
            pytest.fail("opened without a worker")


# --- stopping ----------------------------------------------------------------------------------------


async def test_a_drain_lets_admitted_requests_finish(clock: MockClock, opened: Open) -> None:
    results: list[list[Output]] = []

    async def one() -> None:
        results.append(await collect(engine))

    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await trio.sleep(2.5)
        engine.request_shutdown(60, by="test")
        await wait_all_tasks_blocked()
        assert engine.state is EngineState.DRAINING
        assert not engine.health().ready
        with pytest.raises(EngineDraining, match="draining"):
            await collect(engine)
        report = await engine.wait_stopped()
    assert results[0][-1].finish_reason == "length"
    assert (report.drained, report.aborted, report.exit_code) == (1, 0, 0)
    assert report.seconds < 20


async def test_the_deadline_ends_a_drain_with_what_there_is(clock: MockClock, opened: Open) -> None:
    results: list[list[Output]] = []

    async def one() -> None:
        results.append(await collect(engine, params=SamplingParams(temperature=0, max_tokens=500)))

    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await trio.sleep(1.5)
        began = trio.current_time()
        report = await engine.shutdown(10)
        assert trio.current_time() - began <= 10
    assert results[0][-1].finish_reason == "abort"
    assert len(tokens_of(results[0])) >= 5
    assert (report.drained, report.aborted, report.exit_code) == (0, 1, 0)


@pytest.mark.parametrize(
    ("how", "outcome"), [("no time", "timeout"), ("expedite", "hurried"), ("kill", "hurried")]
)
async def test_a_drain_can_be_cut_short(clock: MockClock, opened: Open, how: str, outcome: str) -> None:
    results: list[list[Output]] = []

    async def one() -> None:
        results.append(await collect(engine, params=SamplingParams(temperature=0, max_tokens=500)))

    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await trio.sleep(2.5)
        began = trio.current_time()
        engine.request_shutdown(0 if how == "no time" else 100)
        if how != "no time":
            await trio.sleep(1)
            engine.expedite() if how == "expedite" else engine.kill(signal.SIGTERM)
        report = await engine.wait_stopped()
        assert trio.current_time() - began < 5
    assert [stage.outcome for stage in report.stages if stage.name == "drain"] == [outcome]
    assert ("hurried" in str(report)) == (outcome == "hurried")
    assert results[0][-1].finish_reason == "abort"


@pytest.mark.parametrize(("seconds", "outcome"), [(100.0, "done"), (4.0, "timeout")])
async def test_an_order_to_hurry_that_comes_late_changes_no_outcome(
    clock: MockClock, opened: Open, seconds: float, outcome: str
) -> None:
    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(collect, engine)
        await trio.sleep(2.5)
        engine.request_shutdown(seconds)
        await engine._life.cell.wait_for(EngineState.STOPPING if outcome == "done" else EngineState.ABORTING)
        engine.expedite()
        report = await engine.wait_stopped()
    assert (report.stages[0].name, report.stages[0].outcome) == ("drain", outcome)


async def test_cancelling_the_scope_around_it_drains(clock: MockClock, opened: Open) -> None:
    results: list[list[Output]] = []

    async def one(engine: Engine) -> None:
        with trio.CancelScope(shield=True):
            results.append(await collect(engine))

    with trio.CancelScope() as scope:
        async with opened() as (engine, _), trio.open_nursery() as nursery:
            nursery.start_soon(one, engine)
            await trio.sleep(2.5)
            scope.cancel()
    assert scope.cancelled_caught
    assert results[0][-1].finish_reason == "length"
    assert engine.state is EngineState.STOPPED


@pytest.mark.parametrize(
    "raised",
    [
        ValueError("alone"),
        ExceptionGroup("of one", [ValueError()]),
        ExceptionGroup("outer", [ExceptionGroup("inner", [ValueError()])]),
        ExceptionGroup("of two", [ValueError(), KeyError()]),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
async def test_what_its_body_raises_comes_out_as_it_was(
    raised: BaseException, clock: MockClock, opened: Open
) -> None:
    with pytest.raises(type(raised)) as caught:
        async with opened():
            raise raised
    assert caught.value is raised


async def test_a_failing_task_of_its_body_comes_out_in_its_group(clock: MockClock, opened: Open) -> None:
    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError

    with pytest.raises(ExceptionGroup) as caught:
        async with opened(), trio.open_nursery() as nursery:
            nursery.start_soon(fail)
    assert [type(error) for error in caught.value.exceptions] == [ValueError]


async def test_a_stop_while_loading_is_quick(clock: MockClock, opened: Open) -> None:
    began = trio.current_time()
    with trio.move_on_after(5):
        async with opened(FakeBehaviour(load_seconds=1000.0)):
            pytest.fail("opened before the model was loaded")
    assert trio.current_time() - began < 7


async def test_states_only_go_forward_and_children_stop_in_reverse(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, workers):
        names = [child.child_id for child in engine.children()]
        assert names == ["tokenizer", "replica0", "router", "lifecycle"]
        replica = engine.children()[1]
        assert [child.child_id for child in replica.children] == ["workers", "scheduler"]
    assert engine.report is not None
    assert [stage.name for stage in engine.report.stages] == [
        "drain",
        "lifecycle",
        "router",
        "replica0",
        "tokenizer",
    ]
    assert [state for state, _ in engine._life.cell.history] == [
        EngineState.STARTING,
        EngineState.RUNNING,
        EngineState.DRAINING,
        EngineState.STOPPING,
        EngineState.STOPPED,
    ]
    assert not workers.started[0].alive()
    assert math.isfinite(engine.report.seconds)


# --- what had gone wrong once ---------------------------------------------------------------------------


async def test_two_unlucky_losses_do_not_make_clients_wait_in_line(
    clock: MockClock, opened: Open, script: ScriptedSettings
) -> None:
    """All are suspects after two losses in a row; each runs alone only until its first tokens clear it."""
    params = SamplingParams(temperature=0, max_tokens=100)
    results: list[list[int]] = []

    async def one(number: int) -> None:
        results.append(tokens_of(await collect(engine, [300 + number], params)))

    async with opened() as (engine, workers), trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(one, number)
        for pause in (10.5, 2.5):
            await trio.sleep(pause)
            workers.started[-1].die("was killed by SIGKILL")
        began = trio.current_time()
        nursery.start_soon(one, 6)
    # Six in line would take 6 * 80 steps; cleared after a few tokens each they finish together.
    assert trio.current_time() - began < 180
    assert sorted(results) == sorted(scripted_tokens([300 + n], params, 100, script) for n in range(7))


async def test_a_start_that_takes_too_long_fails(clock: MockClock, opened: Open) -> None:
    with pytest.raises(Exception, match="--start-timeout 5 s"):
        async with opened(FakeBehaviour(load_seconds=1000.0), start_timeout=5.0):
            pytest.fail("opened before the model was loaded")


async def test_a_hung_worker_is_not_asked_to_stop(clock: MockClock, opened: Open) -> None:
    async with opened(step_timeout=30.0) as (engine, workers), trio.open_nursery() as nursery:
        nursery.start_soon(collect, engine)
        await trio.sleep(2.5)
        workers.started[0].hang()
        await trio.sleep(31)
        assert len(workers.started) == 2
        assert not any(isinstance(message, Stop) for message in workers.started[0].received)


async def test_more_choices_than_ever_fit_are_a_bad_request(clock: MockClock, opened: Open) -> None:
    async with opened(max_bs=2, max_num_batched_tokens=16, max_queue=3) as (engine, _):
        with pytest.raises(InvalidParameter, match="at most 5"):
            await collect(engine, params=SamplingParams(n=6, max_tokens=2))


async def test_the_first_children_are_up_while_the_model_is_fetched(model: Path) -> None:
    listening, fetched = trio.Event(), threading.Event()

    async def http(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        listening.set()
        await trio.sleep_forever()

    def fetch(config: EngineConfig) -> LocalModel:
        assert fetched.wait(60)
        return local_model(model)

    config = EngineConfig(runner="ullm.testing:ScriptedRunner", model=str(model))
    engine = Engine(
        config,
        first_children=[ChildSpec("http", http)],
        transport=FakeWorkers().open,
        find_model=fetch,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(nursery.start, engine.run)
        await listening.wait()
        assert (engine.health().live, engine.health().state) == (True, "starting")
        assert [child.child_id for child in engine.children()] == ["http"]
        fetched.set()
        with trio.fail_after(60):
            while not engine.health().ready:
                await engine._router.wait_changed()
                await wait_all_tasks_blocked()
        names = [child.child_id for child in engine.children()]
        assert names == ["http", "tokenizer", "replica0", "router", "lifecycle"]
        await engine.shutdown()


async def test_a_worker_that_is_suspended_while_it_starts_is_replaced(clock: MockClock, opened: Open) -> None:
    async with opened(FakeBehaviour(load_seconds=5.0), faults="worker.start:stop@nth=2") as (engine, workers):
        began = trio.current_time()
        workers.started[0].die("was killed by SIGKILL")
        assert await collect(engine)
        assert trio.current_time() - began < 10  # two seconds to find out, five to load
        assert len(workers.started) == 3


@pytest.mark.parametrize(("late", "restarts"), [(0.1, 0), (0.5, 1)])
async def test_an_answer_that_is_there_when_it_is_overdue_counts(
    clock: MockClock, opened: Open, late: float, restarts: int
) -> None:
    """As after a suspension of the whole machine, or of the server alone."""
    seen = iter(range(100))

    def behaviour(spec: object) -> FakeBehaviour:
        return FakeBehaviour(step_seconds=0.0 if next(seen) else 5.0 + late)

    async with opened(behaviour, step_timeout=5.0) as (engine, _):
        await collect(engine, params=SamplingParams(temperature=0, max_tokens=3))
        assert engine.statistics().worker_restarts_total == restarts
