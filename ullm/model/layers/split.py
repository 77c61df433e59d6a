"""How a model's heads, hidden units and layers are divided over ranks, whether or not the numbers divide.

Pure arithmetic: every rank computes every rank's share, so they agree without talking.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ullm.errors import ModelUnsupported

Run = tuple[int, int]
"""Neighbouring rows or columns of a checkpoint tensor: the first one, and how many."""

UNITS = (32, 16, 1)
"""Hidden units are divided in groups of these sizes: a group of quantized weights, a vector of the CPU
kernels, and, where these would leave the ranks too unequal, one by one."""
UNEQUAL = 1.125
"""How much more than an equal share a rank may have for the sake of whole groups."""


@dataclass(frozen=True)
class HeadShare:
    """The heads of one rank.

    Query head ``heads[i]`` attends with KV head ``kv_heads[i // group]``, where the group is
    ``len(heads) // len(kv_heads)``, the same for all of them.

    Args:
        heads: query heads of the whole model, in this rank's order.
        kv_heads: KV heads of the whole model, in this rank's order; other ranks may hold the same ones.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]


def share_evenly(total: int, ranks: int, rank: int) -> range:
    """Return the share of one rank: sizes differ by at most one, the first ranks have more."""
    least, more = divmod(total, ranks)
    first = rank * least + min(rank, more)
    return range(first, first + least + (rank < more))


def share_units(total: int, ranks: int, rank: int) -> Run:
    """Return one rank's hidden units, in whole groups where that leaves the ranks about equal.

    Raises:
        ModelUnsupported: there are fewer units than ranks.
    """
    if total < ranks:
        raise ModelUnsupported(
            f"the model's {total} hidden units of each MLP cannot be split over --tp-size {ranks}; use a "
            f"size of at most {total}"
        )
    for unit in UNITS:
        groups = total // unit
        if total % unit == 0 and groups >= ranks and -(-groups // ranks) * unit <= UNEQUAL * total / ranks:
            break
    share = share_evenly(total // unit, ranks, rank)
    return share.start * unit, len(share) * unit


def share_heads(num_heads: int, num_kv_heads: int, ranks: int) -> list[HeadShare]:
    """Return every rank's heads, divided so that the busiest rank has as few as possible.

    Raises:
        ModelUnsupported: there are fewer query heads than ranks.
    """
    if num_heads < ranks:
        raise ModelUnsupported(
            f"the model's {num_heads} attention heads cannot be split over --tp-size {ranks}; use a size of "
            f"at most {num_heads}"
        )
    group = num_heads // num_kv_heads
    ways = [
        _grid(num_kv_heads, group, ranks, copies)
        for copies in range(1, ranks + 1)
        if ranks % copies == 0 and copies <= group and ranks // copies <= num_kv_heads
    ]
    rows = [share_evenly(num_heads, ranks, rank) for rank in range(ranks)]
    in_a_row = [_own_groups(row, group) for row in rows]
    ways += [[share for share in in_a_row if share is not None]] if None not in in_a_row else []
    # The last resort is always possible: each query head has a copy of its KV head to itself.
    apart = [HeadShare(tuple(row), tuple(head // group for head in row)) for row in rows]
    return min(ways, key=_cost, default=apart)


def _grid(num_kv_heads: int, group: int, ranks: int, copies: int) -> list[HeadShare]:
    """Divide KV heads over the ranks; ``copies`` neighbours hold the same ones and share their queries."""
    shares = []
    for rank in range(ranks):
        kv_heads = share_evenly(num_kv_heads, ranks // copies, rank // copies)
        queries = share_evenly(group, copies, rank % copies)
        heads = tuple(kv * group + query for kv in kv_heads for query in queries)
        shares.append(HeadShare(heads, tuple(kv_heads)))
    return shares


def _own_groups(heads: range, group: int) -> HeadShare | None:
    """Return neighbouring heads with their KV heads; None if these have different numbers of heads."""
    kv_heads = sorted({head // group for head in heads})
    counts = {sum(head // group == kv for head in heads) for kv in kv_heads}
    return HeadShare(tuple(heads), tuple(kv_heads)) if len(counts) == 1 else None


def _cost(way: list[HeadShare]) -> tuple[int, int]:
    """Return what the slowest rank computes, and the KV heads that the fullest one keeps."""
    return max(len(share.heads) for share in way), max(len(share.kv_heads) for share in way)


def runs(indices: Iterable[int], size: int) -> tuple[Run, ...]:
    """Return the rows of heads, ``size`` rows each, with neighbouring heads as one run."""
    found: list[Run] = []
    for index in indices:
        if found and sum(found[-1]) == index * size:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((index * size, size))
    return tuple(found)


def run_length(parts: tuple[Run, ...]) -> int:
    """Return the number of rows in all runs."""
    return sum(count for _, count in parts)
