"""Sums and gathers over shared memory: ranks are threads here, which meet as processes do."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ullm.model.kernels.cpu.build import open_library
from ullm.model.kernels.cpu.exchange import CAPACITY, SharedExchange

LIBRARY = open_library()

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs a C++ compiler")


@contextmanager
def exchanges(ranks: int, *, spins: int = 100, timeout: float = 30.0) -> Iterator[list[SharedExchange]]:
    """The ends of all ranks."""
    assert LIBRARY is not None
    first = SharedExchange(LIBRARY, ranks, 0, None, spins=spins, timeout=timeout)
    ends = [first]
    for rank in range(1, ranks):
        ends.append(SharedExchange(LIBRARY, ranks, rank, first.path, spins=spins, timeout=timeout))
    for end in reversed(ends):
        end.forget_path()
    yield ends


def on_all(ends: list[SharedExchange], act: Callable[[int, SharedExchange], Any]) -> list[Any]:
    """Call a function for each rank, in a thread of its own, and return what they return."""
    found: list[Any] = [None] * len(ends)

    def run(rank: int) -> None:
        try:
            found[rank] = act(rank, ends[rank])
        except RuntimeError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("count", [1, 576, CAPACITY // 4, CAPACITY // 4 * 2 + 7])
def test_sums_are_right_and_equal_on_all_ranks(ranks: int, count: int) -> None:
    parts = [torch.randn(count, generator=torch.Generator().manual_seed(rank)) for rank in range(ranks)]
    expected = parts[0].clone()
    for part in parts[1:]:  # in the order of the ranks, so bit by bit
        expected += part

    def add(rank: int, end: SharedExchange) -> torch.Tensor:
        x = parts[rank].clone()
        end.all_reduce(x)
        return x

    with exchanges(ranks) as ends:
        for found in on_all(ends, add):
            assert torch.equal(found, expected)


def test_gathers_keep_the_order_of_the_ranks_and_any_dtype() -> None:
    size = CAPACITY // 8 + 3

    def gather(rank: int, end: SharedExchange) -> torch.Tensor:
        return end.gather(torch.full((2, size), rank, dtype=torch.int64))

    with exchanges(3) as ends:
        for found in on_all(ends, gather):
            assert torch.equal(found, torch.arange(3)[:, None, None].expand(3, 2, size))


@pytest.mark.parametrize("spins", [0, 1000])
def test_no_round_overtakes_another(spins: int) -> None:
    """Ranks of any speed: none reads what belongs to the round before, or after."""

    def run(rank: int, end: SharedExchange) -> list[float]:
        draw, sums = random.Random(rank), []
        for number in range(300):
            if draw.random() < 0.05:
                time.sleep(0.002 * draw.random())
            x = torch.full((5,), float(number + 1000 * rank))
            end.all_reduce(x)
            sums.append(float(x[4]))
        return sums

    with exchanges(3, spins=spins) as ends:
        for found in on_all(ends, run):
            assert found == [3 * number + 3000 for number in range(300)]


def test_a_rank_that_does_not_come_is_an_error_and_stays_one() -> None:
    with exchanges(2, timeout=0.2) as (first, _):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"another rank did not answer within 0\.2 s"):
                first.all_reduce(torch.ones(3))


def test_memory_that_is_gone_is_an_error() -> None:
    assert LIBRARY is not None
    with pytest.raises(OSError, match="nothing"):
        SharedExchange(LIBRARY, 2, 1, "/proc/self/fd/nothing", spins=0, timeout=1)
