"""Sleeping, waking and reloading on a virtual clock, with workers in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.engine import PROMPT, STEP, Open, collect, tokens_of
from ullm.config import EngineConfig, SleepMode
from ullm.engine import Engine
from ullm.engine.output import Output
from ullm.errors import (
    EngineBusy,
    EngineDead,
    EngineDraining,
    EngineSleeping,
    InvalidParameter,
    ModelFileBroken,
    OutOfMemory,
    ReloadFailed,
)
from ullm.hub import LocalModel, resolve
from ullm.protocol.messages import Sleep, Start, Step, Stop, Wake
from ullm.sampling import SamplingParams
from ullm.testing import (
    FakeBehaviour,
    FakeWorker,
    ScriptedSettings,
    local_model,
    scripted_tokens,
    write_scripted_model,
)

GREEDY = SamplingParams(temperature=0, max_tokens=10)
LEVELS = [0, 1, 2, 3]


@pytest.fixture
def expected(model: Path) -> list[int]:
    return scripted_tokens(PROMPT, GREEDY, 10, ScriptedSettings.read(str(model)))


class BackgroundRequest:
    """A request in the background."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.done = trio.Event()

    async def run(self, engine: Engine) -> None:
        async with engine.generate(PROMPT, GREEDY) as generation:
            async for output in generation:
                self.outputs.append(output)
        self.done.set()


def said(worker: FakeWorker, kind: type) -> list[Any]:
    return [message for message in worker.received if isinstance(message, kind)]


# --- levels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
async def test_it_sleeps_wakes_and_says_the_same(
    clock: MockClock, opened: Open, expected: list[int], level: int
) -> None:
    async with opened() as (engine, workers):
        before = await collect(engine)
        health = await engine.sleep(level)
        assert (health.state, health.level) == ("asleep", level)
        assert engine.health().state == "sleeping"
        assert engine.health().replicas[0].state == "asleep"
        health = await engine.wake()
        assert (health.state, health.level) == ("awake", None)
        assert engine.health().state == "running"
        assert tokens_of(await collect(engine)) == tokens_of(before) == expected
    assert [message.level for message in said(workers.started[0], Sleep)] == (
        [level] if level in (1, 2) else []
    )
    assert len(said(workers.started[0], Wake)) == (1 if level in (1, 2) else 0)
    assert len(workers.started) == (2 if level == 3 else 1)
    assert len(said(workers.started[0], Stop)) == 1
    statistics = engine.statistics()
    assert (statistics.sleeps_total, statistics.wakes_total) == ({level: 1}, 1)
    assert statistics.worker_restarts_total == 0


async def test_sleeping_deeper_and_less_deep(clock: MockClock, opened: Open, expected: list[int]) -> None:
    async with opened() as (engine, workers):
        levels = [(await engine.sleep(level)).level for level in (0, 1, 1, 2, 1, 3, 0, 3)]
        assert levels == [0, 1, 1, 2, 2, 3, 3, 3]
        assert tokens_of(await collect(engine)) == expected  # and a request wakes it from there
        assert engine.health().sleep.state == "awake"
    assert [message.level for message in said(workers.started[0], Sleep)] == [1, 2]


async def test_waking_twice_and_an_engine_that_is_awake(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, _):
        assert (await engine.wake()).state == "awake"
        await engine.sleep(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.wake)
            nursery.start_soon(engine.wake)
        assert engine.health().sleep.state == "awake"
        assert engine.statistics().wakes_total == 1


@pytest.mark.parametrize(
    ("level", "mode", "param"), [(4, "wait", "level"), (-1, "wait", "level"), (1, "x", "mode")]
)
async def test_what_makes_no_sense_is_refused(
    clock: MockClock, opened: Open, level: int, mode: SleepMode, param: str
) -> None:
    async with opened() as (engine, _):
        with pytest.raises(InvalidParameter) as caught:
            await engine.sleep(level, mode)
        assert caught.value.param == param
        assert engine.health().sleep.state == "awake"


# --- requests in flight ----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
async def test_wait_lets_requests_end_first(
    clock: MockClock, opened: Open, expected: list[int], level: int
) -> None:
    running = BackgroundRequest()
    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        await engine.sleep(level, "wait")
        assert running.done.is_set()
    assert tokens_of(running.outputs) == expected


@pytest.mark.parametrize("level", LEVELS)
async def test_abort_ends_them_with_what_they_have(
    clock: MockClock, opened: Open, expected: list[int], level: int
) -> None:
    running = BackgroundRequest()
    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        await engine.sleep(level, "abort")
        await running.done.wait()
        assert engine.statistics().kv_blocks_used == 0
    assert running.outputs[-1].finish_reason == "abort"
    assert tokens_of(running.outputs) == expected[: len(tokens_of(running.outputs))] != []


@pytest.mark.parametrize("level", LEVELS)
async def test_keep_goes_on_after_the_wake(
    clock: MockClock, opened: Open, expected: list[int], level: int
) -> None:
    running = BackgroundRequest()
    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        await engine.sleep(level, "keep")
        had = len(tokens_of(running.outputs))
        await trio.sleep(100 * STEP)
        assert engine.health().sleep.state == "asleep"  # what it keeps does not wake it
        assert len(tokens_of(running.outputs)) <= had + 1
        assert not running.done.is_set()
        await engine.wake()
        await running.done.wait()
    assert tokens_of(running.outputs) == expected


# --- requests that come ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
async def test_a_request_wakes_it(clock: MockClock, opened: Open, expected: list[int], level: int) -> None:
    async with opened() as (engine, _):
        await engine.sleep(level)
        assert engine.health().ready
        assert tokens_of(await collect(engine)) == expected
        assert engine.health().sleep.state == "awake"


async def test_a_request_does_not_wake_it_where_that_is_off(clock: MockClock, opened: Open) -> None:
    async with opened(wake_on_request=False) as (engine, _):
        await engine.sleep(1)
        with pytest.raises(EngineSleeping):
            await collect(engine)
        health = engine.health()
        assert (health.ready, health.sleep.registered) == (False, False)
        assert "asleep" in health.detail
        await engine.wake()
        assert engine.health().ready
        assert len(tokens_of(await collect(engine))) == 10


async def test_a_request_admitted_while_it_falls_asleep_is_served(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    running, late = BackgroundRequest(), BackgroundRequest()
    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        late_generation = engine.generate(PROMPT, GREEDY)
        nursery.start_soon(engine.sleep, 1, "wait")
        await wait_all_tasks_blocked()
        async with late_generation as generation:
            late.outputs = [output async for output in generation]
        assert running.done.is_set()
    assert tokens_of(late.outputs) == tokens_of(running.outputs) == expected


async def test_a_request_is_admitted_when_it_is_entered(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    running = BackgroundRequest()
    async with opened(wake_on_request=False) as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        early_enough, too_late = (engine.generate(PROMPT, GREEDY) for _ in range(2))
        async with early_enough as generation:
            nursery.start_soon(engine.sleep, 1, "wait")
            await wait_all_tasks_blocked()
            with pytest.raises(EngineSleeping):
                await too_late.__aenter__()
            assert tokens_of([output async for output in generation]) == expected
        assert running.done.is_set()
        await engine.wake()


async def test_a_wake_calls_off_a_sleep_that_waits(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    running, errors = BackgroundRequest(), []

    async def fall_asleep(engine: Engine) -> None:
        try:
            await engine.sleep(2, "wait")
        except EngineBusy as error:
            errors.append(str(error))

    async with opened() as (engine, workers), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        nursery.start_soon(fall_asleep, engine)
        await trio.sleep(STEP)
        assert engine.health().sleep.state == "falling_asleep"
        assert (await engine.wake()).state == "awake"
    assert errors
    assert said(workers.started[0], Sleep) == []
    assert tokens_of(running.outputs) == expected


async def test_sleeping_while_waking(clock: MockClock, opened: Open) -> None:
    async with opened(FakeBehaviour(load_seconds=10.0)) as (engine, _), trio.open_nursery() as nursery:
        await engine.sleep(3)
        nursery.start_soon(engine.wake)
        await trio.sleep(5)
        assert engine.health().sleep.state == "waking"
        assert engine.health().replicas[0].state == "waking"
        assert (await engine.sleep(1)).level == 1


# --- by itself ---------------------------------------------------------------------------------------------


async def test_it_sleeps_when_idle_and_wakes_on_request(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    async with opened(sleep_after=30.0, sleep_level=2) as (engine, workers):
        await trio.sleep(29)
        assert engine.health().sleep.state == "awake"
        assert tokens_of(await collect(engine)) == expected
        await trio.sleep(29)
        assert engine.health().sleep.state == "awake"
        await trio.sleep(2)
        assert (engine.health().sleep.state, engine.health().sleep.level) == ("asleep", 2)
        assert tokens_of(await collect(engine)) == expected
        await trio.sleep(31)
        assert engine.health().sleep.state == "asleep"
    assert len(said(workers.started[0], Sleep)) == 2


# --- faults and stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_a_worker_that_dies_asleep_is_replaced_by_one_that_sleeps(
    clock: MockClock, opened: Open, expected: list[int], level: int
) -> None:
    async with opened() as (engine, workers):
        await engine.sleep(level)
        workers.started[0].die("was killed by SIGKILL")
        await trio.sleep(5)
        assert engine.health().sleep.state == "asleep"
        assert [message.level for message in said(workers.started[1], Sleep)] == ([level] if level else [])
        assert tokens_of(await collect(engine)) == expected


@pytest.mark.parametrize("level", [1, 2])
async def test_a_worker_that_dies_waking_up_costs_nothing(
    clock: MockClock, opened: Open, expected: list[int], level: int
) -> None:
    behaviour = {0: FakeBehaviour(die_on=lambda message: isinstance(message, Wake))}
    seen = iter(range(100))
    async with opened(lambda spec: behaviour.get(next(seen), FakeBehaviour())) as (engine, workers):
        await engine.sleep(level)
        assert tokens_of(await collect(engine)) == expected
        assert len(workers.started) == 2


@pytest.mark.parametrize("level", LEVELS)
async def test_a_stop_while_asleep_is_as_any_other(clock: MockClock, opened: Open, level: int) -> None:
    async with opened() as (engine, workers):
        await engine.sleep(level)
        report = await engine.shutdown()
        assert (report.exit_code, report.killed, report.abandoned) == (0, 0, 0)
        with pytest.raises(EngineDraining):
            await engine.wake()
    assert len(said(workers.started[0], Stop)) == 1


@pytest.mark.parametrize("level", LEVELS)
async def test_a_stop_while_asleep_lets_kept_requests_end(
    clock: MockClock, opened: Open, expected: list[int], level: int
) -> None:
    running = BackgroundRequest()
    async with opened(shutdown_timeout=100.0) as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        await engine.sleep(level, "keep")
        report = await engine.shutdown()
        assert (report.drained, report.aborted, report.exit_code) == (1, 0, 0)
    assert tokens_of(running.outputs) == expected


async def test_a_stop_overtakes_a_sleep_that_waits(clock: MockClock, opened: Open) -> None:
    running, errors = BackgroundRequest(), []

    async def fall_asleep(engine: Engine) -> None:
        try:
            await engine.sleep(2, "wait")
        except EngineBusy as error:
            errors.append(str(error))

    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        nursery.start_soon(fall_asleep, engine)
        await trio.sleep(STEP)
        report = await engine.shutdown(0.0)
        assert report.exit_code == 0
    assert len(errors) == 1
    assert running.outputs[-1].finish_reason == "abort"


@pytest.mark.parametrize("lost", [1, 3, 4])
async def test_workers_lost_while_they_wake_are_started_again_within_the_limit(
    clock: MockClock, opened: Open, expected: list[int], lost: int
) -> None:
    killed = FakeBehaviour(die_on=lambda message: isinstance(message, Start))
    seen = iter(range(100))

    async def sleep_and_ask() -> list[int]:
        async with opened(lambda spec: killed if 0 < next(seen) <= lost else FakeBehaviour()) as (engine, _):
            await engine.sleep(3)
            return tokens_of(await collect(engine))

    if lost <= EngineConfig().max_restarts:
        assert await sleep_and_ask() == expected
        return
    with pytest.raises(EngineDead, match="SIGKILL"):
        await sleep_and_ask()


async def test_workers_that_cannot_be_started_again_end_the_engine(clock: MockClock, opened: Open) -> None:
    gone = FakeBehaviour(load_error=ModelFileBroken("model.safetensors", "is gone"))
    seen = iter(range(100))
    with pytest.raises(EngineDead, match="is gone"):  # noqa: PT012  # leaving the block raises it
        async with opened(lambda spec: gone if next(seen) else FakeBehaviour()) as (engine, _):
            await engine.sleep(3)
            with pytest.raises(EngineDead, match="is gone"):
                await collect(engine)
            await engine.wait_stopped()
    assert engine.report is not None
    assert engine.report.exit_code == 70


# --- reload ------------------------------------------------------------------------------------------------


async def test_a_reload_replaces_the_workers_and_loses_nothing(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    running = BackgroundRequest()
    async with opened() as (engine, workers), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        report = await engine.reload()
        assert running.done.is_set()  # on the old workers
        assert (report.replicas, report.resumed) == ([1], 0)
        assert [worker.alive() for worker in workers.started] == [False, True]
        assert engine.health().replicas[0].epoch == 2
        assert tokens_of(await collect(engine)) == expected
        statistics = engine.statistics()
        assert (statistics.reloads_total, statistics.worker_restarts_total) == (
            {"succeeded": 1, "failed": 0},
            0,
        )
    assert tokens_of(running.outputs) == expected


async def test_requests_that_take_too_long_go_on_with_the_new_workers(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    running = BackgroundRequest()
    async with opened(shutdown_timeout=4.0) as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        assert (await engine.reload()).resumed == 1
        assert not running.done.is_set()
    assert tokens_of(running.outputs) == expected


async def test_a_reload_that_fails_changes_nothing(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    broken = FakeBehaviour(load_error=ModelFileBroken("model.safetensors", "is truncated"))
    running, seen = BackgroundRequest(), iter(range(100))
    behaviour = FakeBehaviour(step_seconds=STEP)
    async with (
        opened(lambda spec: broken if next(seen) == 1 else behaviour) as (engine, workers),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        with pytest.raises(ReloadFailed, match=r"old workers serve on: .*is truncated"):
            await engine.reload()
        assert workers.started[0].alive()
        assert tokens_of(await collect(engine)) == expected
        assert engine.health().ready
        await engine.reload()  # the third one comes up
        assert tokens_of(await collect(engine)) == expected
        assert engine.statistics().reloads_total == {"succeeded": 1, "failed": 1}
    assert tokens_of(running.outputs) == expected


async def test_a_model_with_another_tokenizer_is_refused(
    clock: MockClock, opened: Open, tmp_path: Path, model: Path
) -> None:
    other = write_scripted_model(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    async with opened(find_model=lambda config: local_model(Path(config.model))) as (engine, workers):
        with pytest.raises(ReloadFailed, match="another tokenizer"):
            await engine.reload(model=str(other))
        assert len(workers.started) == 1
        assert engine.config.model == str(model)


async def test_another_model_keeps_the_served_name(
    clock: MockClock, opened: Open, tmp_path: Path, model: Path
) -> None:
    other = write_scripted_model(tmp_path / "other")
    async with opened(find_model=lambda config: local_model(Path(config.model))) as (engine, workers):
        report = await engine.reload(model=str(other))
        assert report.model == str(other)
        assert said(workers.started[1], Start)[0].model_path == str(other)
        assert engine.config.model_name == engine.model_name == model.name
        await engine.reload()
        assert said(workers.started[2], Start)[0].model_path == str(other)


async def test_new_requests_get_the_new_models_chat_template_and_end_of_sequence_tokens(
    clock: MockClock, opened: Open, expected: list[int], tmp_path: Path
) -> None:
    other = write_scripted_model(tmp_path / "other", eos_after=4, eos_token_id=5)
    (other / "chat_template.jinja").write_text("NEW {{ bos_token }}{{ messages[0]['content'] }}")
    tokenizer_config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"bos_token": "<|im_start|>"}))
    hello = [{"role": "user", "content": "Hello"}]
    running = BackgroundRequest()
    async with (
        opened(find_model=lambda config: local_model(Path(config.model))) as (engine, _),
        trio.open_nursery() as nursery,
    ):
        assert (await engine.tokenizer.render_chat(hello)).startswith("<|im_start|>user")
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        await engine.reload(model=str(other))
        assert await engine.tokenizer.render_chat(hello) == "NEW <|im_start|>Hello"
        ids = await engine.tokenizer.encode_chat(hello)
        assert engine.tokenizer.decode(ids, skip_special_tokens=False) == "NEW <|im_start|>Hello"
        assert engine.info.eos_token_ids == (5,)
        outputs = await collect(engine)
        assert outputs[-1].finish_reason == "stop"
        assert len(tokens_of(outputs)) < len(expected)
        # The tokenizer's actor may be restarted; it must not go back to the first model's files.
        await trio.to_thread.run_sync(engine.tokenizer.load)
        assert await engine.tokenizer.render_chat(hello) == "NEW <|im_start|>Hello"
    assert tokens_of(running.outputs) == expected  # in flight, it keeps what it began with


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("tokenizer_config.json", "{ not JSON", r"tokenizer_config\.json: not readable as JSON"),
        ("chat_template.jinja", "fine\n{% if %}", r"the model's chat template cannot be used \(line 2: "),
        ("chat_template.json", "[]", r"the model's chat template cannot be used \(chat_template\.json: "),
        ("special_tokens_map.json", "[]", r"special_tokens_map\.json: must hold a JSON object"),
        ("generation_config.json", "{ not JSON", r"generation_config\.json: not readable as JSON"),
        ("tokenizer.json", None, r"tokenizer\.json: cannot be read"),
    ],
)
async def test_new_files_that_the_front_end_cannot_use_change_nothing(
    clock: MockClock,
    opened: Open,
    expected: list[int],
    tmp_path: Path,
    file: str,
    content: str | None,
    cause: str,
) -> None:
    other = write_scripted_model(tmp_path / "other")
    (other / "chat_template.jinja").write_text("NEW")
    if content is None:
        (other / file).unlink()
    else:
        (other / file).write_text(content)
    hello = [{"role": "user", "content": "Hello"}]
    find_model = of_config if content is None else resolve  # which would convert a tokenizer
    async with opened(find_model=find_model) as (engine, workers):
        before = await engine.tokenizer.render_chat(hello)
        with pytest.raises(ReloadFailed, match=rf"the old workers serve on: .*{cause}") as caught:
            await engine.reload(model=str(other))
        assert "\n" not in str(caught.value)
        assert len(workers.started) == 1
        assert await engine.tokenizer.render_chat(hello) == before
        assert tokens_of(await collect(engine)) == expected
        assert engine.statistics().reloads_total == {"succeeded": 0, "failed": 1}


async def test_a_new_model_without_a_chat_template_is_a_warning(
    clock: MockClock, opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_scripted_model(tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    async with opened(find_model=of_config) as (engine, _):
        await engine.reload(model=str(other))
        with pytest.raises(InvalidParameter, match="the model has no chat template"):
            await engine.tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    assert "the new model has no chat template; chats will be refused" in caplog.text


def of_config(config: EngineConfig) -> LocalModel:
    return local_model(Path(config.model))


async def test_another_model_keeps_all_served_names(clock: MockClock, opened: Open, tmp_path: Path) -> None:
    other = write_scripted_model(tmp_path / "other")
    names = ("first", "second")
    async with opened(lambda spec: FakeBehaviour(), of_config, served_model_name=names) as (engine, _):
        await engine.reload(model=str(other))
        assert engine.config.model_names == names


async def test_a_reload_wakes_a_sleeper(clock: MockClock, opened: Open, expected: list[int]) -> None:
    async with opened() as (engine, _):
        await engine.sleep(2)
        await engine.reload()
        assert engine.health().sleep.state == "awake"
        assert tokens_of(await collect(engine)) == expected


@pytest.mark.parametrize("comes_up", [True, False])
async def test_where_memory_holds_one_the_old_workers_sleep_meanwhile(
    clock: MockClock, opened: Open, expected: list[int], monkeypatch: pytest.MonkeyPatch, comes_up: bool
) -> None:
    monkeypatch.setattr("ullm.engine.reload.Reloader._needs_swap", lambda self: True)
    failing = FakeBehaviour(load_error=OutOfMemory("cuda:0: out of memory"))
    behaviour = FakeBehaviour(step_seconds=STEP, load_seconds=5.0)
    running, seen = BackgroundRequest(), iter(range(100))
    async with (
        opened(lambda spec: failing if next(seen) and not comes_up else behaviour) as (engine, workers),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        if comes_up:
            assert (await engine.reload()).resumed == 0
        else:
            with pytest.raises(ReloadFailed, match="out of memory"):
                await engine.reload()
        await running.done.wait()
        assert [message.level for message in said(workers.started[0], Sleep)] == [1]
        assert len(said(workers.started[0], Wake)) == (0 if comes_up else 1)
        assert tokens_of(await collect(engine)) == expected
    assert tokens_of(running.outputs) == expected


async def test_a_reload_of_several_replicas_rolls(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    async with opened(replicas=2) as (engine, workers), trio.open_nursery() as nursery:
        everyone = [BackgroundRequest() for _ in range(6)]
        for running in everyone:
            nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        assert (await engine.reload()).replicas == [2, 3]
        assert [worker.alive() for worker in workers.started] == [False, False, True, True]
        for running in everyone:
            await running.done.wait()
            assert tokens_of(running.outputs) == expected


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("broken", [2, 3, 4])
async def test_a_reload_of_several_replicas_is_all_or_nothing(
    clock: MockClock,
    opened: Open,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    broken: int,
    swap: bool,
) -> None:
    """Whichever new worker does not come up: the old ones serve on, all of them, and nobody else does."""
    if swap:
        monkeypatch.setattr("ullm.engine.reload.Reloader._needs_swap", lambda self: True)
    failing = FakeBehaviour(load_error=OutOfMemory("no memory for this one"))
    seen = iter(range(100))
    async with (
        opened(
            lambda spec: (
                failing if next(seen) == broken else FakeBehaviour(step_seconds=STEP, load_seconds=3)
            ),
            replicas=3 if broken == 4 else 2,
        ) as (engine, workers),
        trio.open_nursery() as nursery,
    ):
        count = len(workers.started)
        everyone = [BackgroundRequest() for _ in range(6)]
        for running in everyone:
            nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        with pytest.raises(ReloadFailed, match=r"old workers serve on: .*no memory for this one"):
            await engine.reload()
        for running in everyone:
            await running.done.wait()
            assert tokens_of(running.outputs) == expected
        assert [replica.replica for replica in engine.health().replicas] == list(range(count))
        assert [worker.alive() for worker in workers.started[:count]] == [True] * count
        assert not any(worker.alive() for worker in workers.started[count:])
        assert not any(
            said(worker, Step)[1:] for worker in workers.started[count:]
        )  # besides the first, empty
        assert engine.statistics().worker_restarts_total == 0
        new = (await engine.reload()).replicas
        assert (len(new), min(new) > broken - 1) == (count, True)
        assert tokens_of(await collect(engine)) == expected


async def test_a_reload_takes_the_place_of_a_replica_that_was_given_up(
    clock: MockClock, opened: Open, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for ever for the one that has gone to fall asleep."""
    monkeypatch.setattr("ullm.engine.reload.Reloader._needs_swap", lambda self: True)
    async with opened(replicas=2, max_restarts=0) as (engine, workers):
        workers.started[0].die("was killed by SIGKILL")
        await trio.sleep(STEP)
        assert engine.health().replicas[0].state == "failed"
        with trio.fail_after(100):
            assert (await engine.reload()).replicas == [2, 3]
        assert tokens_of(await collect(engine)) == expected


async def test_a_requested_reload_needs_nobody_to_wait(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, workers):
        engine.request_reload()
        engine.request_reload()
        await trio.sleep(5)
        assert len(workers.started) == 3
        assert engine.health().ready


async def test_many_requests_at_once_are_one_further_reload(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, workers):
        engine.request_reload()
        await wait_all_tasks_blocked()  # the first one has begun
        for _ in range(59):
            engine.request_reload()
        await trio.sleep(60)
        assert len(workers.started) == 3
        engine.request_reload()
        await trio.sleep(60)
        assert len(workers.started) == 4


@pytest.mark.parametrize("begun", [False, True])
async def test_no_reload_begins_once_a_stop_was_requested(
    begun: bool, clock: MockClock, opened: Open, expected: list[int]
) -> None:
    """Requested with the stop, before it, or in the drain; one that has begun is finished."""
    running = BackgroundRequest()
    async with opened() as (engine, workers), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        if begun:
            engine.request_reload()
            await wait_all_tasks_blocked()
        engine.request_reload()
        engine.request_shutdown()
        engine.request_reload()
        await trio.sleep(STEP)
        engine.request_reload()
        report = await engine.wait_stopped()
        assert (report.exit_code, report.aborted) == (0, 0)
    assert tokens_of(running.outputs) == expected
    assert len(workers.started) == 1 + begun


async def test_a_stop_overtakes_a_reload(clock: MockClock, opened: Open) -> None:
    behaviour = {1: FakeBehaviour(load_seconds=1000.0)}
    seen = iter(range(100))
    errors: list[str] = []

    async def reload(engine: Engine) -> None:
        try:
            await engine.reload()
        except EngineBusy as error:
            errors.append(str(error))

    async with (
        opened(lambda spec: behaviour.get(next(seen), FakeBehaviour())) as (engine, workers),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(reload, engine)
        await trio.sleep(5)
        began = trio.current_time()
        report = await engine.shutdown()
        assert trio.current_time() - began < 6
        assert report.exit_code == 0
    assert not any(worker.alive() for worker in workers.started)
    assert len(errors) == 1


async def test_sleeping_deep_beside_a_worker_that_hangs_waits_for_its_watchdog_only(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    running = BackgroundRequest()
    async with opened(step_timeout=5.0) as (engine, workers), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        workers.started[0].hang()
        began = trio.current_time()
        await engine.sleep(3, "keep")
        assert trio.current_time() - began < 6
        await engine.wake()
        await running.done.wait()
    assert tokens_of(running.outputs) == expected


async def test_memory_that_is_short_for_a_moment_does_not_end_a_wake(
    clock: MockClock, opened: Open, expected: list[int]
) -> None:
    short = FakeBehaviour(load_error=OutOfMemory("12 GB are needed, 11 GB are free"))
    seen = iter(range(100))
    async with opened(lambda spec: short if next(seen) in (1, 2) else FakeBehaviour()) as (engine, workers):
        await engine.sleep(3)
        assert tokens_of(await collect(engine)) == expected
        assert len(workers.started) == 4


async def test_an_abort_ends_what_an_earlier_sleep_waits_for(clock: MockClock, opened: Open) -> None:
    running = BackgroundRequest()
    async with opened() as (engine, _), trio.open_nursery() as nursery:
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5 * STEP)
        nursery.start_soon(engine.sleep, 1, "wait")
        await wait_all_tasks_blocked()
        began = trio.current_time()
        await engine.sleep(1, "abort")
        assert trio.current_time() - began < 3 * STEP
        await running.done.wait()
    assert running.outputs[-1].finish_reason == "abort"


async def test_time_awake_counts_from_the_start(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, _):
        assert engine.health().sleep.seconds < 1
        await trio.sleep(5)
        assert 5 <= engine.health().sleep.seconds < 6


async def test_a_revision_of_a_local_folder_makes_no_sense(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, workers):
        with pytest.raises(InvalidParameter, match="local path") as caught:
            await engine.reload(revision="main")
        assert caught.value.param == "revision"
        assert len(workers.started) == 1
