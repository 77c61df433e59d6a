"""Packed weights in the cache: mapped instead of loaded, the same bit by bit, and never in the way."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.model.model_fixtures import LogitsModel, random_tokens, save_tiny
from ullm.errors import OutOfMemory
from ullm.model.architectures import registry
from ullm.model.kernels.cpu.build import find_compiler
from ullm.model.layers.parallel import ParallelContext
from ullm.model.loading import packed
from ullm.model.loading.packed import PackedFile, make_room

pytestmark = pytest.mark.skipif(
    find_compiler() is None or os.name == "nt", reason="only the CPU's kernels pack weights"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that takes tiny models as well."""
    monkeypatch.setattr(packed, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    return tmp_path / "cache" / "packed"


@pytest.fixture
def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on weights cannot be loaded, only mapped."""

    def load_weights(*arguments: object) -> None:
        raise AssertionError("the weights are loaded, not mapped")

    return lambda: monkeypatch.setattr(registry, "load_weights", load_weights)


def logits(path: Path, dtype: str = "float32", parallel: ParallelContext | None = None) -> Tensor:
    model, tokens = LogitsModel(path, dtype=dtype, parallel=parallel), random_tokens(12, seed=1)
    model.add(0, tokens, [0, 1, 2])
    return model.step((0, 0, 12))[0]


@pytest.mark.parametrize("name", ["llama-tied", "llama-bias", "qwen2", "qwen3-bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mapped_weights_are_the_same(
    name: str, dtype: str, cache: Path, tmp_path: Path, forbid_loading: Callable[[], None]
) -> None:
    save_tiny(tmp_path / "model", name)
    with_kernels = logits(tmp_path / "model", dtype)
    assert len(list(cache.iterdir())) == 1
    forbid_loading()
    assert torch.equal(logits(tmp_path / "model", dtype), with_kernels)


def test_each_rank_has_its_own(cache: Path, tmp_path: Path, forbid_loading: Callable[[], None]) -> None:
    save_tiny(tmp_path / "model", "llama-bias")
    ranks = [ParallelContext(rank, 2) for rank in range(2)]
    loaded = [logits(tmp_path / "model", parallel=rank) for rank in ranks]
    assert len(list(cache.iterdir())) == 2
    forbid_loading()
    for rank, expected in zip(ranks, loaded, strict=True):
        assert torch.equal(logits(tmp_path / "model", parallel=rank), expected)


def test_numbers_of_the_model_are_the_same(cache: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-tied")
    first, second = LogitsModel(tmp_path).model, LogitsModel(tmp_path).model
    assert second.num_parameters() == first.num_parameters()
    assert second.weight_bytes() == first.weight_bytes()


def test_tensors_are_aligned(cache: Path) -> None:
    cache.mkdir(parents=True)
    file = PackedFile(cache / "some-1.safetensors")
    weights = {"odd": torch.arange(3.0), "b": torch.ones(64).bfloat16(), "c": torch.arange(32.0)}
    assert file.write(weights)
    found = file.read()
    assert found is not None
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in weights.items()
    }
    assert [found[name].data_ptr() % packed.ALIGNMENT for name in ("b", "c")] == [0, 0]


def test_a_changed_checkpoint_is_loaded_anew(cache: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    before = logits(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert torch.equal(logits(tmp_path / "model"), before)
    assert len(list(cache.iterdir())) == 2


def test_a_broken_file_is_replaced(cache: Path, tmp_path: Path, forbid_loading: Callable[[], None]) -> None:
    save_tiny(tmp_path / "model", "llama")
    before = logits(tmp_path / "model")
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert torch.equal(logits(tmp_path / "model"), before)
    forbid_loading()
    assert torch.equal(logits(tmp_path / "model"), before)


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    cache.parent.write_text("a file where the folder should be")
    assert logits(tmp_path / "model").isfinite().all()


def test_weights_for_which_there_is_no_room_are_not_mapped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama")
    LogitsModel(tmp_path / "model")
    monkeypatch.setattr(registry, "available_memory", lambda: 1000)
    with pytest.raises(OutOfMemory, match="the weights need"):
        LogitsModel(tmp_path / "model")


def test_small_models_and_random_weights_are_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama")
    LogitsModel(tmp_path / "model", load_format="dummy")
    monkeypatch.setattr(packed, "LEAST_BYTES", 16 << 20)
    LogitsModel(tmp_path / "model")
    assert not cache.exists()


def test_the_oldest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LIMIT", 250)
    for number in range(3):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(bytes(100))
        os.utime(file, (number, number))
    make_room(tmp_path / "new-1.safetensors", 100)
    assert [path.name for path in tmp_path.iterdir()] == ["2.safetensors"]
    with pytest.raises(OSError, match="take 251 bytes"):
        make_room(tmp_path / "new-1.safetensors", 251)


def test_a_new_version_replaces_the_old_one(tmp_path: Path) -> None:
    for name in ("same-1.safetensors", "same-2.safetensors", "other-1.safetensors"):
        (tmp_path / name).touch()
    make_room(tmp_path / "same-3.safetensors", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["other-1.safetensors"]


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_file_that_was_not_written_to_its_end_is_not_used(cache: Path, where: float) -> None:
    """After a loss of power, a file may have its full length, but zeros in a part of it."""
    cache.mkdir(parents=True)
    file = PackedFile(cache / "some-1.safetensors")
    assert file.write({name: torch.rand(4_000_000) for name in "abc"})
    assert file.read() is not None
    size = file.path.stat().st_size
    with file.path.open("r+b") as raw:
        raw.seek(int(where * size))
        raw.write(bytes(1 << 20))
    assert file.path.stat().st_size == size
    assert file.read() is None


def test_what_was_left_unfinished_is_deleted(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f"a.safetensors.{ended.pid}.partial").touch()
    mine = tmp_path / f"b.safetensors.{os.getpid()}.partial"
    mine.touch()
    make_room(tmp_path / "new-1.safetensors", 0)
    assert list(tmp_path.iterdir()) == [mine]


def test_files_are_written_in_huge_pages(tmp_path: Path) -> None:
    """Whatever the sizes of the tensors: so the system's cache keeps the file in such pages."""
    sizes: list[int] = []

    class Recorder(io.FileIO):
        def write(self, data: Any, /) -> int:
            sizes.append(len(data))
            return super().write(data)

    weights = {
        f"w{i}": torch.full((size,), i, dtype=torch.uint8)
        for i, size in enumerate((100, 3 << 20, 7, 5 << 20))
    }
    with Recorder(tmp_path / "file.safetensors", "w") as file:
        packed.write_safetensors(packed.WholePages(file), weights, lambda: None)
    assert sizes[:-1] == [packed.HUGE_PAGE] * 4
    assert sizes[-1] < packed.HUGE_PAGE
    read = load_file(tmp_path / "file.safetensors")
    assert all(torch.equal(read[name], weights[name]) for name in weights)
