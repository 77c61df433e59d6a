"""The bytes reported as freed are those that the system has back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ullm.model.memory import device_memory as memory
from ullm.model.memory import kv_pool
from ullm.model.memory.device_memory import MemoryMeter, held_bytes

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.skipif(held_bytes(CPU) is None, reason="this system does not say what is resident")
def test_what_is_reported_is_what_the_system_has_back() -> None:
    """Pieces between others that stay in use are what the C library would keep for later."""
    large, small, kept = [torch.ones(32 * MIB, dtype=torch.uint8)], [], []
    for _ in range(512):
        small.append(torch.ones(64 << 10, dtype=torch.uint8))
        kept.append(torch.ones(64 << 10, dtype=torch.uint8))
    meter = MemoryMeter(CPU)
    meter.release("large", large.clear, nominal=0)
    meter.release("small", small.clear, nominal=0)
    meter.release("nothing", lambda: None, nominal=0)
    assert meter.freed_bytes["large"] == pytest.approx(32 * MIB, rel=0.1)
    assert meter.freed_bytes["small"] == pytest.approx(32 * MIB, rel=0.1)
    assert meter.freed_bytes["nothing"] < MIB
    assert len(kept) == 512


def test_a_system_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "ROLLUP", tmp_path / "none")
    meter = MemoryMeter(CPU)
    meter.release("weights", lambda: None, nominal=7)
    assert meter.freed_bytes == {"weights": 7}


def test_pool_occupies_what_was_touched() -> None:
    before = held_bytes(CPU) or 0
    pool = kv_pool.lazy_zeros((64, MIB), torch.uint8)
    assert (held_bytes(CPU) or 0) - before < MIB
    pool[:16].fill_(1)
    assert pool[16:].count_nonzero() == 0
    del pool
    assert (held_bytes(CPU) or 0) - before < MIB
