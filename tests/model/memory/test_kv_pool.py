"""How many blocks there are."""

from __future__ import annotations

import pytest
import torch

from ullm import machine
from ullm.config import GIB, CacheConfig
from ullm.errors import OutOfMemory
from ullm.machine import available_memory
from ullm.model.memory import kv_pool
from ullm.model.memory.kv_pool import (
    KvShape,
    count_blocks,
    cpu_budget,
    effective_block_size,
    kv_bytes_per_token,
)


def test_block_size_on_cuda_is_a_multiple_of_256() -> None:
    assert [effective_block_size(size, varlen=True) for size in (1, 16, 256, 257)] == [256, 256, 256, 512]
    assert effective_block_size(16, varlen=False) == 16


def test_bytes_per_token() -> None:
    smollm2 = KvShape(num_layers=30, num_kv_heads=3, head_dim=64, num_query_heads=9)
    assert kv_bytes_per_token(smollm2, torch.bfloat16) == 23040


def test_count_blocks_obeys_options_in_order() -> None:
    assert count_blocks(CacheConfig(num_blocks=7, kv_cache_memory=1000), 100, budget=10**6) == 7
    assert count_blocks(CacheConfig(kv_cache_memory=1050), 100, budget=10**6) == 10
    assert count_blocks(CacheConfig(), 100, budget=999) == 9


@pytest.mark.parametrize("budget", [99, 0, -5])
def test_not_one_block(budget: int) -> None:
    with pytest.raises(OutOfMemory, match="not enough memory for one block of KV"):
        count_blocks(CacheConfig(), 100, budget)


def test_cpu_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pool, "available_memory", lambda: 2 * GIB)
    assert cpu_budget() == GIB // 2
    monkeypatch.setattr(kv_pool, "available_memory", lambda: 400 * GIB)
    assert cpu_budget() == GIB
    assert 0 < available_memory() < 1 << 50


def test_container_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"/sys/fs/cgroup/memory.max": 3 * GIB, "/sys/fs/cgroup/memory.current": 2 * GIB}
    monkeypatch.setattr(machine, "_read_int", values.get)
    monkeypatch.setattr(machine, "_meminfo_available", lambda: 5 * GIB)
    assert available_memory() == GIB
