"""Asleep, a rank gives its memory back; awake again, it computes what it computed before, bit by bit."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_fixtures import GREEDY, SHAPE, config, load_runner, save_tiny
from test_gguf import write_model

from ullm.errors import ModelNotFound, OutOfMemory
from ullm.messages import NewSequence, Progress, RankSpec, Row, Sampled, Start, Step
from ullm.model import host_copy, kv_pool, memory, sleep
from ullm.model.cpu.kernels import Kernels
from ullm.model.host_copy import HostCopy
from ullm.model.memory import Meter, held
from ullm.model.rank import Rank, furnish, open_rank, trial_run
from ullm.model.runner import ModelRunner
from ullm.model.sleep import SleepingRank

CPU = torch.device("cpu")
PROMPT = [3 + (7 * i) % 37 for i in range(13)]
PARAMS = dataclasses.replace(GREEDY, logprobs=5, prompt_logprobs=1)
NUMBERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-torch": {"dtype": "bfloat16", "cpu_kernels": False},
}
STAGES = ["steps", "graphs", "kv_cache", "weights", "process_group", "device_cache"]


def write_foreign(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = SHAPE | {"intermediate_size": 128, "initializer_range": 0.2}
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)).save_pretrained(folder)
    return folder


def write_native(folder: Path) -> Path:
    save_tiny(folder, "llama-bias")
    return folder


def write_tied(folder: Path) -> Path:
    save_tiny(folder, "llama-tied")
    return folder


def write_gguf(folder: Path) -> Path:
    return write_model(folder / "model.gguf")


KINDS: dict[str, Callable[[Path], Path]] = {
    "native": write_native,
    "tied": write_tied,
    "foreign": write_foreign,
    "gguf": write_gguf,
}


@pytest.fixture(scope="session", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder or a file, one for each way of loading."""
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


def quiet(_: Progress) -> None:
    """For signs of life that nobody looks at."""


def speak(runner: ModelRunner) -> list[Sampled]:
    """A prompt in two chunks and some tokens, with log probabilities: equal only if every bit is."""
    new = [NewSequence(0, PROMPT, len(PROMPT), PARAMS, list(range(8)))]
    found = runner.submit(Step(0, [Row(0, 0, 7, False)], new)).result().sampled
    found += runner.submit(Step(1, [Row(0, 7, 6, True)])).result().sampled
    for i in range(10):
        found += runner.submit(Step(2 + i, [Row(0, 13 + i, 1, True)])).result().sampled
    runner.submit(Step(99, [], forget=[0]))
    return found


@pytest.mark.parametrize("numbers", NUMBERS)
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
        rank = furnish(*arguments)
        models.append(weakref.ref(rank.model))
        return rank

    monkeypatch.setattr(sleep, "furnish", furnish_and_tell)
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
    runner.submit(Step(0, [Row(0, 0, 13, True)], [NewSequence(0, PROMPT, 13, GREEDY, [0, 1, 2, 3])]))
    runner.sleep(1)
    runner.wake(quiet)
    with pytest.raises(ValueError, match="sequence 0, which is not known"):
        runner.submit(Step(1, [Row(0, 13, 1, True)]))
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
    """As many blocks as before where they still fit, else as many as a start would take."""
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
    monkeypatch.setattr("ullm.model.registry.available_memory", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"the weights need .* MiB"):
        runner.wake(quiet)


def test_kernels_compute_with_as_many_threads_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    use_threads = Kernels.use_threads

    def record(kernels: Kernels, threads: int) -> None:
        asked.append(threads)
        use_threads(kernels, threads)

    monkeypatch.setattr(Kernels, "use_threads", record)
    runner = load_runner(write_native(tmp_path), cpu_threads=2, dtype="bfloat16")
    runner.sleep(2)
    runner.wake(quiet)
    assert asked in ([2, 2], [])  # nothing without a compiler


# --- weights in host memory, as on a GPU -------------------------------------------------------


def opened(path: Path, **options: Any) -> Rank:
    return open_rank(Start(config(path, **options), RankSpec(), str(path)), quiet)


def logits(rank: Rank) -> torch.Tensor:
    return trial_run(rank.model, rank.backend, tokens=4).clone()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("native", {"dtype": "float16"}),  # oneDNN has no weights in these numbers
        ("tied", {"dtype": "float16"}),
        ("foreign", {"load_format": "dummy"}),  # others would be mapped from their file
    ],
)
def test_weights_come_back_into_the_same_tensors(
    kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copy, "CHUNK", 1000)
    rank = opened(KINDS[kind](tmp_path), **options)
    expected, tensors = logits(rank), list(rank.model.tensors())
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
    asleep = SleepingRank(rank)
    asleep.park_weights()
    assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
    woken = asleep.wake(quiet)
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == sizes
    assert torch.equal(logits(woken), expected)


def test_tensors_that_share_memory_count_once() -> None:
    whole = torch.arange(10.0)
    views = [whole, whole[3:], whole.view(2, 5)]
    copy = HostCopy(views)
    assert copy.num_bytes == 40
    copy.restore(lambda: None)
    assert [view.sum().item() for view in views] == [45.0, 42.0, 45.0]
    assert copy.num_bytes == 0


def test_deeper_from_host_memory(tmp_path: Path) -> None:
    rank = opened(write_native(tmp_path), dtype="float16")
    expected, asleep = logits(rank), SleepingRank(rank)
    asleep.park_weights()
    asleep.sleep(2)
    assert torch.equal(logits(asleep.wake(quiet)), expected)


def test_no_room_in_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the weights are loaded again, as from a deeper sleep."""
    rank = opened(write_native(tmp_path), dtype="float16")
    expected, model = logits(rank), weakref.ref(rank.model)
    monkeypatch.setattr(sleep, "available_memory", lambda: 1000)
    asleep = SleepingRank(rank)
    asleep.park_weights()
    assert model() is None
    assert torch.equal(logits(asleep.wake(quiet)), expected)


# --- what is measured --------------------------------------------------------------------------

MIB = 1 << 20


@pytest.mark.skipif(held(CPU) is None, reason="this system does not say what is resident")
def test_what_is_reported_is_what_the_system_has_back() -> None:
    """Pieces between others that stay in use are what the C library would keep for later."""
    large, small, kept = [torch.ones(32 * MIB, dtype=torch.uint8)], [], []
    for _ in range(512):
        small.append(torch.ones(64 << 10, dtype=torch.uint8))
        kept.append(torch.ones(64 << 10, dtype=torch.uint8))
    meter = Meter(CPU)
    meter.release("large", large.clear, nominal=0)
    meter.release("small", small.clear, nominal=0)
    meter.release("nothing", lambda: None, nominal=0)
    assert meter.given_back["large"] == pytest.approx(32 * MIB, rel=0.1)
    assert meter.given_back["small"] == pytest.approx(32 * MIB, rel=0.1)
    assert meter.given_back["nothing"] < MIB
    assert len(kept) == 512


def test_a_system_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "ROLLUP", tmp_path / "none")
    meter = Meter(CPU)
    meter.release("weights", lambda: None, nominal=7)
    assert meter.given_back == {"weights": 7}


def test_pool_occupies_what_was_touched() -> None:
    before = held(CPU) or 0
    pool = kv_pool.lazy_zeros((64, MIB), torch.uint8)
    assert (held(CPU) or 0) - before < MIB
    pool[:16].fill_(1)
    assert pool[16:].count_nonzero() == 0
    del pool
    assert (held(CPU) or 0) - before < MIB
