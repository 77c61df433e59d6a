"""Weights kept in host memory, as on a GPU; here the device is a CPU as well."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.checkpoint_kinds import KINDS, quiet, write_native
from tests.model.model_fixtures import config
from ullm.model.execution import sleep
from ullm.model.execution.rank import Rank, open_rank, trial_run
from ullm.model.execution.sleep import SleepingRank
from ullm.model.memory import host_copy
from ullm.model.memory.host_copy import HostCopy
from ullm.protocol.messages import RankSpec, Start


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
    copy = HostCopy(views, torch.device("cpu"))
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


class Graphs:
    """In place of captured steps."""

    def __init__(self, diary: list[str]) -> None:
        self.diary = diary

    def release(self) -> None:
        self.diary.append("graphs")


def test_a_gpu_gets_graphs_pool_and_weights_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's answers are simulated; weights and pool are real ones, on the CPU."""
    rank, diary = opened(write_native(tmp_path), dtype="float16"), list[str]()
    expected, context = logits(rank), rank.context
    rank.graphs = Graphs(diary)  # type: ignore[assignment]
    rank.context = dataclasses.replace(context, device=torch.device("cuda"))
    reserved = iter([1000, 900, 850, 350, 50, 50, 50, 50])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: diary.append("empty cache"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (949, 2000))
    asleep = SleepingRank(rank)
    assert asleep.sleep(1) == {"graphs": 50, "kv_cache": 500, "weights": 300}
    assert diary == ["empty cache", "graphs", "empty cache", "empty cache", "empty cache"]
    assert asleep.sleep(2) == {"weights": 0}
    assert not asleep._still_fits()  # 950 are needed, the caches included
    asleep.context = context
    assert torch.equal(logits(asleep.wake(quiet)), expected)
