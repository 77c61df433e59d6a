"""A standby worker prepares the model if its weights can be shared; otherwise it only reads files ahead."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.model_fixtures import config, generate, load_runner, random_tokens, save_tiny
from ullm.errors import ModelNotFound
from ullm.model.architectures import registry
from ullm.model.execution import standby
from ullm.model.execution.runner import ModelRunner
from ullm.model.execution.standby import prepare_model, read_ahead
from ullm.model.kernels.cpu.build import find_compiler
from ullm.model.layers.parallel import ParallelContext
from ullm.model.loading import packed
from ullm.model.loading.checkpoint import read_checkpoint
from ullm.protocol.messages import Prepare, Progress, RankSpec, Start

PROMPT = random_tokens(9, seed=3)
needs_kernels = pytest.mark.skipif(
    find_compiler() is None or os.name == "nt", reason="only the CPU's kernels share weights"
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, in front of an empty cache that takes it."""
    monkeypatch.setattr(packed, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    save_tiny(tmp_path / "model", "llama")
    return tmp_path / "model"


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the files that were read ahead."""
    found: list[Path] = []
    monkeypatch.setattr(standby, "read_ahead", found.extend)
    return found


def prepare(path: Path, rank: RankSpec | None = None, **options: Any) -> Prepare:
    return Prepare(config(path, **options), rank or RankSpec(epoch=1), str(path))


def start(path: Path, **options: Any) -> Start:
    return Start(config(path, **options), RankSpec(replica=4, epoch=7, rendezvous="elsewhere"), str(path))


def ignore(progress: Progress) -> None:
    """Nobody listens."""


@pytest.fixture
def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on weights can be neither loaded nor mapped."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("the weights are read")

    def forbid() -> None:
        monkeypatch.setattr(registry, "load_weights", refuse)
        monkeypatch.setattr(packed, "safe_open", refuse)

    return forbid


@needs_kernels
def test_a_prepared_model_is_started(model: Path, forbid_reading: Callable[[], None]) -> None:
    expected = generate(load_runner(model), PROMPT, 5)
    runner = ModelRunner()
    runner.prepare(prepare(model), ignore)
    forbid_reading()
    runner.load(start(model), ignore)
    assert generate(runner, PROMPT, 5) == expected


@needs_kernels
def test_another_start_than_prepared_for_loads_anew(model: Path, tmp_path: Path) -> None:
    load_runner(model)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    runner = ModelRunner()
    runner.prepare(prepare(model), ignore)
    info = runner.load(start(other, context_len=64), ignore)
    assert info.context_len == 64
    assert generate(runner, PROMPT, 5) == generate(load_runner(other), PROMPT, 5)


@needs_kernels
def test_what_is_prepared_suits_any_incarnation_of_the_same_rank(model: Path) -> None:
    load_runner(model)
    prepared = prepare_model(prepare(model))
    assert prepared is not None
    assert prepared.suits(start(model))
    assert not prepared.suits(start(model, context_len=64))
    assert not prepared.suits(Start(config(model), RankSpec(rank=1, world_size=2), str(model)))


@needs_kernels
def test_weights_that_were_never_packed_are_only_read(model: Path, files_read: list[Path]) -> None:
    assert prepare_model(prepare(model)) is None
    assert files_read == [model / "model.safetensors"]


@needs_kernels
def test_a_rank_among_others_meets_them_when_it_starts(model: Path, files_read: list[Path]) -> None:
    load_runner(model)
    assert prepare_model(prepare(model, RankSpec(rank=1, world_size=2, rendezvous="nowhere:1"))) is None
    assert files_read == [model / "model.safetensors"]


@needs_kernels
@pytest.mark.parametrize("stages", [1, 2])
def test_a_rank_among_others_maps_its_own_part(model: Path, stages: int) -> None:
    rank, options = RankSpec(rank=1, world_size=2, rendezvous="nowhere:1", num_stages=stages), config(model)
    cpu, place = torch.device("cpu"), ParallelContext.of(rank)
    registry.load_model(read_checkpoint(model, options, cpu), options, cpu, place, lambda: None)
    prepared = prepare_model(prepare(model, rank))
    assert prepared is not None
    assert (prepared.parallel.rank, prepared.parallel.stage) == ((1, 0) if stages == 1 else (0, 1))
    assert prepared.suits(Start(options, rank, str(model)))
    assert not prepared.suits(start(model))
    other = RankSpec(rank=1, world_size=2, num_stages=3 - stages)
    assert not prepared.suits(Start(options, other, str(model)))
    assert prepare_model(prepare(model, other)) is None, "what another rank has packed is of no use"


def test_without_kernels_weights_are_only_read(model: Path, files_read: list[Path]) -> None:
    assert prepare_model(prepare(model, cpu_kernels=False)) is None
    assert files_read == [model / "model.safetensors"]


def test_what_cannot_be_prepared_is_the_business_of_the_start(tmp_path: Path) -> None:
    runner = ModelRunner()
    runner.prepare(prepare(tmp_path), ignore)
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        runner.load(start(tmp_path), ignore)


def test_reading_ahead(model: Path) -> None:
    read_ahead([model / "model.safetensors"])
    with pytest.raises(FileNotFoundError):
        read_ahead([model / "none"])
