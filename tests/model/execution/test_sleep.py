"""A sleeping rank frees its memory; awake again, it computes the same results as before, bit by bit."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.model.checkpoint_kinds import KINDS, quiet, write_native
from tests.model.model_fixtures import GREEDY, load_runner
from ullm.errors import ModelNotFound, OutOfMemory
from ullm.model.execution import sleep
from ullm.model.execution.rank import Rank, attach_kv_pool
from ullm.model.execution.runner import ModelRunner
from ullm.model.kernels.cpu.kernels import CpuKernels
from ullm.model.memory import kv_pool
from ullm.protocol.messages import NewSequence, Progress, Sampled, ScheduledSequence, Step

PROMPT = [3 + (7 * i) % 37 for i in range(13)]
PARAMS = dataclasses.replace(GREEDY, logprobs=5, prompt_logprobs=1)
NUMBERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-torch": {"dtype": "bfloat16", "cpu_kernels": False},
}
STAGES = ["steps", "graphs", "kv_cache", "weights", "process_group", "device_cache"]


@pytest.fixture(scope="session", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder or a file, one for each way of loading."""
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


def speak(runner: ModelRunner) -> list[Sampled]:
    """A prompt in two chunks and some tokens, with log probabilities: equal only if every bit is."""
    new = [NewSequence(0, PROMPT, len(PROMPT), PARAMS, list(range(8)))]
    found = runner.submit(Step(0, [ScheduledSequence(0, 0, 7, False)], new)).result().sampled
    found += runner.submit(Step(1, [ScheduledSequence(0, 7, 6, True)])).result().sampled
    for i in range(10):
        found += runner.submit(Step(2 + i, [ScheduledSequence(0, 13 + i, 1, True)])).result().sampled
    runner.submit(Step(99, [], released=[0]))
    return found


@pytest.mark.parametrize(
    "numbers",
    ["bfloat16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "bfloat16-torch"))],
)
def test_output_after_any_sleep_is_as_before(model: Path, numbers: str) -> None:
    runner = load_runner(model, **NUMBERS[numbers])
    expected = speak(runner)
    for levels in ([1], [2], [1, 2]):
        for level in levels:
            runner.sleep(level)
        info = runner.wake(quiet)
        assert (info.num_blocks, info.block_size) == (64, 4)
        assert speak(runner) == expected
    runner.close()


def test_what_is_given_back_is_named(model: Path) -> None:
    runner = load_runner(model)
    assert list(runner.sleep(1)) == ["kv_cache"]
    assert list(runner.sleep(2)) == ["weights"]
    runner.wake(quiet)
    assert list(runner.sleep(2)) == ["kv_cache", "weights"]


def test_nothing_keeps_the_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[Any]] = []

    def furnish_and_tell(*arguments: Any) -> Rank:
        rank = attach_kv_pool(*arguments)
        models.append(weakref.ref(rank.model))
        return rank

    monkeypatch.setattr(sleep, "attach_kv_pool", furnish_and_tell)
    runner = load_runner(model)
    runner.sleep(2)
    runner.wake(quiet)
    speak(runner)
    assert models[0]() is not None
    runner.sleep(1)
    assert models[0]() is not None
    runner.sleep(2)
    assert models[0]() is None


def test_sequences_are_forgotten(llama: tuple[Path, Any]) -> None:
    runner = load_runner(llama[0])
    runner.submit(
        Step(0, [ScheduledSequence(0, 0, 13, True)], [NewSequence(0, PROMPT, 13, GREEDY, [0, 1, 2, 3])])
    )
    runner.sleep(1)
    runner.wake(quiet)
    with pytest.raises(ValueError, match="sequence 0, which is not known"):
        runner.submit(Step(1, [ScheduledSequence(0, 13, 1, True)]))
    assert speak(runner)  # by the same number


def test_what_cannot_be_done_asleep_or_awake(llama: tuple[Path, Any]) -> None:
    runner = load_runner(llama[0])
    with pytest.raises(RuntimeError, match="wake comes after sleep"):
        runner.wake(quiet)
    runner.sleep(1)
    with pytest.raises(RuntimeError, match="no model is loaded: load or wake come before submit"):
        runner.submit(Step(0, []))
    with pytest.raises(RuntimeError, match="no model is loaded"):
        ModelRunner().sleep(1)


@pytest.mark.parametrize("levels", [[1], [2], [1, 2]])
def test_close_asleep(llama: tuple[Path, Any], levels: list[int]) -> None:
    runner = load_runner(llama[0])
    for level in levels:
        runner.sleep(level)
    assert list(runner.close()) == STAGES
    assert runner.close() == {}


def test_wake_that_is_interrupted_can_be_closed_or_repeated(llama: tuple[Path, Any]) -> None:
    """Wherever it shows a sign of life; so does a worker that is stopped meanwhile."""
    runner, seen = load_runner(llama[0]), list[Progress]()
    expected = speak(runner)
    runner.sleep(2)
    runner.wake(seen.append)
    assert [progress.stage for progress in seen] == ["load", "profile", "warmup"]
    runner.sleep(2)
    for stage in [progress.stage for progress in seen]:

        def interrupt(progress: Progress, at: str = stage) -> None:
            if progress.stage == at:
                raise InterruptedError(at)

        with pytest.raises(InterruptedError, match=stage):
            runner.wake(interrupt)
    runner.wake(quiet)
    assert speak(runner) == expected
    runner.sleep(2)
    with pytest.raises(InterruptedError, match="warmup"):
        runner.wake(interrupt)
    assert list(runner.close()) == STAGES


def test_weights_that_are_gone(llama: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(llama[0], tmp_path / "model")
    runner = load_runner(folder)
    expected = speak(runner)
    (folder / "model.safetensors").unlink()
    runner.sleep(1)
    runner.wake(quiet)
    assert speak(runner) == expected
    runner.sleep(2)
    with pytest.raises(ModelNotFound, match=r"has neither model\.safetensors nor"):
        runner.wake(quiet)
    runner.close()


@pytest.mark.parametrize("kind", ["native", "foreign"])
def test_random_weights_are_the_same_ones_again(kind: str, tmp_path: Path) -> None:
    runner = load_runner(KINDS[kind](tmp_path), load_format="dummy")
    expected = speak(runner)
    runner.sleep(2)
    runner.wake(quiet)
    assert speak(runner) == expected


def test_less_memory_than_before(llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool has as many blocks as before if they still fit, else as many as a start would allocate."""
    runner = load_runner(llama[0], num_blocks=None)
    before = kv_pool.cpu_budget() // (4 * 2 * 3 * 2 * 16 * 4)
    runner.sleep(1)
    monkeypatch.setattr(kv_pool, "available_memory", lambda: 1 << 20)
    assert runner.wake(quiet).num_blocks > 0.9 * before
    runner.sleep(1)
    monkeypatch.setattr(sleep, "available_memory", lambda: 1 << 20)
    assert runner.wake(quiet).num_blocks == (1 << 18) // (4 * 2 * 3 * 2 * 16 * 4)
    assert speak(runner)


def test_no_room_for_the_weights_any_more(llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load_runner(llama[0])
    runner.sleep(2)
    monkeypatch.setattr("ullm.model.architectures.registry.available_memory", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"the weights need .* MiB"):
        runner.wake(quiet)


def test_kernels_compute_with_as_many_threads_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    use_threads = CpuKernels.use_threads

    def record(kernels: CpuKernels, threads: int) -> None:
        asked.append(threads)
        use_threads(kernels, threads)

    monkeypatch.setattr(CpuKernels, "use_threads", record)
    runner = load_runner(write_native(tmp_path), cpu_threads=2, dtype="bfloat16")
    runner.sleep(2)
    runner.wake(quiet)
    assert asked in ([2, 2], [])  # nothing without a compiler
