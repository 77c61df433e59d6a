"""`LLM` under asyncio, under trio, and without a loop; on a scripted model in a thread worker."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trio

import ullm.llm
from ullm.config import EngineConfig
from ullm.errors import ConfigError, EngineStopped, InvalidParameter, ModelNotFound
from ullm.llm import LLM, GenerateOutput, SamplingParams
from ullm.testing import ScriptedSettings, scripted_tokens, write_scripted_model
from ullm.testing.models import write_tiny_model

PROMPT = [300, 301]
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"), step_seconds=0.001)


def build(model: Path, **options: Any) -> LLM:
    return LLM(
        str(model),
        use_threading=True,
        load_format="dummy",
        runner="ullm.testing:ScriptedRunner",
        **options,
    )


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    llm = build(model)
    yield llm
    llm.shutdown(0)


def expected(model: Path, prompt: list[int] = PROMPT, params: SamplingParams = GREEDY) -> list[int]:
    return scripted_tokens(prompt, params, params.max_tokens or 0, ScriptedSettings.read(str(model)))


async def collect(llm: LLM, params: SamplingParams = GREEDY) -> list[GenerateOutput]:
    return [token async for token in llm.generate(PROMPT, params)]


def test_it_can_be_built_before_a_loop_runs_and_used_in_asyncio(llm: LLM, model: Path) -> None:
    async def main() -> None:
        await llm.ready()
        outputs = await collect(llm)
        assert [token for output in outputs for token in output.token_ids] == expected(model)
        assert [output.is_finished for output in outputs][-1]
        assert outputs[-1].finish_reason == "length"
        assert (outputs[-1].num_prompt_tokens, outputs[-1].num_generated_tokens) == (2, 8)
        assert all(isinstance(output.token_str, str) for output in outputs)

    asyncio.run(main())


async def test_it_works_the_same_under_trio(llm: LLM, model: Path) -> None:
    await llm.ready()
    outputs = await collect(llm)
    assert [token for output in outputs for token in output.token_ids] == expected(model)


def test_it_survives_the_loop_that_used_it(llm: LLM) -> None:
    tokens = [[id for output in asyncio.run(collect(llm)) for id in output.token_ids] for _ in range(2)]
    assert tokens[0] == tokens[1] != []  # how many come together may differ


def test_many_streams_at_once(llm: LLM) -> None:
    async def main() -> None:
        alone = await collect(llm)
        together = await asyncio.gather(*(collect(llm) for _ in range(20)))
        texts = {"".join(output.token_str for output in outputs) for outputs in together}
        assert texts == {"".join(output.token_str for output in alone)}

    asyncio.run(main())


def test_a_batch_without_any_loop(llm: LLM, model: Path) -> None:
    first, second = llm.generate_sync([PROMPT, [400]], GREEDY)
    assert first[0].token_ids == expected(model)
    assert second[0].token_ids == expected(model, [400])
    assert first[0].finish_reason == "length"


def test_a_plain_loop_is_told_what_to_do(llm: LLM) -> None:
    with pytest.raises(TypeError, match=r"async for.*generate_sync"):
        list(llm.generate(PROMPT))


def test_a_batch_with_parameters_of_its_own_for_each(llm: LLM) -> None:
    lengths = [3, 1, 5]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in lengths]
    answers = llm.generate_sync([PROMPT] * 3, params)
    assert [len(choice.token_ids) for (choice,) in answers] == lengths
    with pytest.raises(ValueError, match="3 prompts need as many"):
        llm.generate_sync([PROMPT] * 3, params[:2])


def test_a_batch_has_all_choices(llm: LLM) -> None:
    (choices,) = llm.generate_sync("The supervisor", SamplingParams(n=3, seed=5, max_tokens=6))
    assert len({choice.text for choice in choices}) == 3


def test_chat_messages_go_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    ((choice,),) = llm.generate_sync([messages], GREEDY)
    assert choice.num_prompt_tokens > 5


def test_a_bad_request_is_one_error_and_harms_nothing(llm: LLM) -> None:
    with pytest.raises(InvalidParameter, match="empty"):
        llm.generate_sync([PROMPT, []], GREEDY)
    assert llm.generate_sync([PROMPT], GREEDY)[0][0].finish_reason == "length"


@pytest.mark.parametrize("prompt", [np.array(PROMPT), torch.tensor(PROMPT), tuple(map(np.int64, PROMPT))])
def test_prompts_of_other_libraries_are_converted(llm: LLM, model: Path, prompt: Any) -> None:
    params = SamplingParams(
        temperature=np.float64(0), max_new_tokens=np.int64(8), stop_token_ids=np.array([])
    )  # type: ignore[arg-type]
    (completions,) = llm.generate_sync([prompt], params)
    assert completions[0].token_ids == expected(model)


@pytest.mark.parametrize(
    "prompt",
    [[300, True], [300, 1.5], b"bytes", 5, None, {"a": 1}, "\ud800", [300, -1], [2**70], [[300]], [{}, 5]],
)
def test_what_is_no_prompt_is_refused_and_harms_nobody(llm: LLM, model: Path, prompt: Any) -> None:
    async def main() -> list[list[GenerateOutput]]:
        async def other() -> None:
            with pytest.raises(InvalidParameter):
                _ = [token async for token in llm.generate(prompt, GREEDY)]

        neighbour, _ = await asyncio.gather(collect(llm), other())
        return [neighbour, await collect(llm)]

    for outputs in asyncio.run(main()):
        assert [token for output in outputs for token in output.token_ids] == expected(model)


@pytest.mark.parametrize(
    "other", [{"max_bs": 3}, {"context_len": 5}, {"dtype": "float32"}, {"use_threading": True}]
)
def test_arguments_beside_a_config_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"set {next(iter(other))} there"):
        LLM(EngineConfig(), **other)


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="LLM has no option contxt_len; did you mean context_len"):
        LLM(contxt_len=3)


def test_it_sleeps_wakes_and_reloads_under_asyncio(llm: LLM, model: Path) -> None:
    async def main() -> None:
        for level in range(4):
            assert (await llm.sleep(level)).level == level
            assert (await llm.health()).state == "sleeping"
            outputs = await collect(llm)  # which wakes it
            assert [token for output in outputs for token in output.token_ids] == expected(model)
        await llm.sleep(1, "keep")
        assert (await llm.wake()).state == "awake"
        assert (await llm.reload()).replicas == [1]
        assert (await llm.health()).ready

    asyncio.run(main())


async def test_it_sleeps_wakes_and_reloads_under_trio(llm: LLM, model: Path) -> None:
    assert (await llm.sleep(2)).level == 2
    assert (await llm.wake()).state == "awake"
    await llm.reload()
    outputs = await collect(llm)
    assert [token for output in outputs for token in output.token_ids] == expected(model)
    with pytest.raises(InvalidParameter, match="level"):
        await llm.sleep(7)


def test_dropping_a_stream_aborts_it(llm: LLM) -> None:
    async def main() -> None:
        stream = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1900), "dropped")
        await anext(stream)
        del stream
        gc.collect()
        assert llm.generate_sync([PROMPT], GREEDY)  # a whole turn later
        await llm.ready()

    asyncio.run(main())
    engine = llm._host._engine
    assert engine is not None
    assert engine.statistics().requests_total.get("abort") == 1


def test_abort_by_sequence_id(llm: LLM) -> None:
    async def main() -> None:
        outputs = []
        async for output in llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1900), "mine"):
            outputs.append(output)
            llm.abort("mine")
        assert outputs[-1].finish_reason == "abort"
        assert len(outputs) < 1000

    asyncio.run(main())


def test_tokenize_and_detokenize_are_inverse(llm: LLM) -> None:
    async def main() -> None:
        assert await llm.detokenize(await llm.tokenize("Größe, 東京 😀")) == "Größe, 東京 😀"

    asyncio.run(main())


def test_shutdown_without_a_loop_blocks_until_all_is_gone(model: Path) -> None:
    before = set(threading.enumerate())
    llm = build(model)
    llm.generate_sync([PROMPT], GREEDY)
    report = llm.shutdown().wait()
    assert report is not None
    assert report.exit_code == 0
    assert not [thread for thread in set(threading.enumerate()) - before if "ullm" in thread.name]
    llm.shutdown()


def test_shutdown_in_a_loop_drains_the_streams_of_that_loop(model: Path) -> None:
    llm = build(model)

    async def main() -> None:
        stream = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=200))
        outputs = [await anext(stream)]
        ending = llm.shutdown()
        outputs += [output async for output in stream]
        report = await ending
        assert outputs[-1].finish_reason == "length"
        assert report is not None
        assert (report.drained, report.aborted) == (1, 0)
        with pytest.raises(EngineStopped, match="this program has shut it down"):
            await collect(llm)

    asyncio.run(main())


def test_reading_with_a_time_limit_after_a_close_and_after_ones_own_shutdown(model: Path) -> None:
    llm = build(model)
    params = SamplingParams(temperature=0, max_tokens=50)

    async def main() -> None:
        stream = llm.generate(PROMPT, params)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0)
        outputs = [output async for output in stream]
        assert (outputs[-1].finish_reason, outputs[-1].num_generated_tokens) == ("length", 50)
        closed, left = llm.generate(PROMPT, params), llm.generate(PROMPT, params)
        await anext(closed)
        await closed.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(closed)
        await anext(left)
        await llm.shutdown(0)
        assert [output async for output in left][-1].finish_reason == "abort"
        with pytest.raises(EngineStopped):
            await anext(llm.generate(PROMPT, params))

    asyncio.run(main())


def test_a_model_that_is_not_there_is_told_to_whoever_asks() -> None:
    llm = LLM("/nowhere/at/all", use_threading=True)
    with pytest.raises(ModelNotFound, match="/nowhere/at/all"):
        asyncio.run(llm.ready())
    with pytest.raises(ModelNotFound):
        llm.generate_sync([PROMPT])
    llm.shutdown()


def test_the_object_can_be_collected(model: Path) -> None:
    llm = build(model)
    llm.generate_sync([PROMPT], GREEDY)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None


def test_one_config_says_everything(model: Path) -> None:
    config = EngineConfig(
        model=str(model), transport="thread", load_format="dummy", runner="ullm.testing:ScriptedRunner"
    )
    with LLM(config) as llm:
        assert llm.generate_sync([PROMPT], GREEDY)


@pytest.mark.process
def test_both_kinds_of_tasks_of_trio_asyncio_can_use_it(model: Path) -> None:
    """In a process of its own: trio-asyncio changes asyncio's event loop policy when it is imported."""
    script = f"""
import trio, trio_asyncio
from ullm.llm import LLM, SamplingParams
llm = LLM({str(model)!r}, use_threading=True, load_format="dummy", runner="ullm.testing:ScriptedRunner")
async def collect():
    params = SamplingParams(temperature=0, max_tokens=6)
    return [id async for output in llm.generate([300, 301], params) for id in output.token_ids]
async def main():
    async with trio_asyncio.open_loop():
        in_trio = await collect()
        assert len(in_trio) == 6
        assert in_trio == await trio_asyncio.aio_as_trio(collect)()
trio.run(main)
llm.shutdown()
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "equal\n"


async def test_two_engines_live_in_one_process(model: Path) -> None:
    async with build(model) as first, build(model) as second:
        results: list[list[GenerateOutput]] = []

        async def one(llm: LLM) -> None:
            results.append(await collect(llm))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, first)
            nursery.start_soon(one, second)
    texts = ["".join(output.token_str for output in outputs) for outputs in results]
    assert texts[0] == texts[1] != ""  # how many tokens come together may differ


@pytest.mark.process
def test_a_script_that_forgets_to_shut_down_ends_and_leaves_nothing(model: Path) -> None:
    script = f"""
from ullm import LLM, SamplingParams
llm = LLM({str(model)!r}, load_format="dummy", runner="ullm.testing:ScriptedRunner")
print(llm.generate_sync([[300]], SamplingParams(temperature=0, max_tokens=3))[0][0].token_ids)
print(llm._thread.call(llm._host.health).replicas[0].worker_pids[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    pid = int(done.stdout.split()[-1])
    assert not Path(f"/proc/{pid}").exists()


def test_a_chat_calls_tools(tmp_path: Path) -> None:
    """A model of random weights, held to a valid call."""
    model = write_tiny_model(tmp_path)
    function = {
        "name": "pick",
        "parameters": {
            "type": "object",
            "properties": {"one": {"enum": ["a", "b"]}},
            "required": ["one"],
            "additionalProperties": False,
        },
    }
    with LLM(str(model), use_threading=True, dtype="float32", log_level="warning") as llm:
        turns = llm.chat(
            [{"role": "user", "content": "Hi"}],
            SamplingParams(n=2, max_tokens=100, seed=1),
            tools=[{"type": "function", "function": function}],
            tool_choice="required",
            parallel_tool_calls=False,
        )
        assert [turn.finish_reason for turn in turns] == ["tool_calls"] * 2
        for turn in turns:
            (call,) = turn.tool_calls
            assert call.name == "pick"
            assert json.loads(call.arguments)["one"] in ("a", "b")
            assert turn.content == ""
        (plain,) = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=5))
        assert plain.tool_calls == []
        assert plain.finish_reason == "length"
        with pytest.raises(InvalidParameter, match="tool_choice"):
            llm.chat([{"role": "user", "content": "Hi"}], tool_choice="required")


@pytest.mark.parametrize("name", ["ChatTurn", "Completion", "FunctionCall", "GenerateOutput"])
def test_values_name_the_module_that_programs_import_them_from(name: str) -> None:
    """So a pickle of one can be read again, whichever module of ullm it is written in."""
    value = getattr(ullm.llm, name)
    assert value.__module__ == "ullm.llm"
    assert pickle.loads(pickle.dumps(value)) is value
