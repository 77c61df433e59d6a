"""How heads and hidden units are divided: every one has a rank, and none has much more than the others."""

from __future__ import annotations

import pytest

from ullm.errors import ModelUnsupported
from ullm.model.layers.split import HeadShare, runs, share_evenly, share_heads, share_units

SHAPES = [(9, 3), (4, 2), (4, 4), (8, 1), (12, 2), (14, 2), (15, 5), (7, 7), (32, 8), (10, 2), (6, 3)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), SHAPES)
def test_each_query_head_is_on_one_rank_beside_its_kv_head(num_heads: int, num_kv_heads: int) -> None:
    for ranks in range(1, num_heads + 1):
        shares = share_heads(num_heads, num_kv_heads, ranks)
        assert len(shares) == ranks
        assert sorted(head for share in shares for head in share.heads) == list(range(num_heads))
        for share in shares:
            group, rest = divmod(len(share.heads), len(share.kv_heads))
            assert rest == 0
            wanted = [head // (num_heads // num_kv_heads) for head in share.heads]
            assert [share.kv_heads[index // group] for index in range(len(share.heads))] == wanted


def test_smollm2() -> None:
    assert share_heads(9, 3, 2) == [HeadShare(tuple(range(6)), (0, 1)), HeadShare((6, 7, 8), (2,))]
    assert share_heads(9, 3, 3)[1] == HeadShare((3, 4, 5), (1,))
    assert max(len(share.heads) for share in share_heads(9, 3, 4)) == 3


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), SHAPES)
def test_what_divides_is_divided_equally(num_heads: int, num_kv_heads: int) -> None:
    for ranks in range(1, num_heads + 1):
        if num_kv_heads % ranks == 0:
            shares = share_heads(num_heads, num_kv_heads, ranks)
            assert {(len(s.heads), len(s.kv_heads)) for s in shares} == {
                (num_heads // ranks, num_kv_heads // ranks)
            }


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(ModelUnsupported, match="9 attention heads cannot be split over --tp-size 10; use a"):
        share_heads(9, 3, 10)


@pytest.mark.parametrize(
    ("total", "ranks", "counts"),
    [
        (1536, 2, [768, 768]),
        (1536, 5, [320, 320, 320, 288, 288]),
        (96, 2, [48, 48]),
        (96, 4, [24] * 4),
        (10, 3, [4, 3, 3]),
    ],
)
def test_hidden_units(total: int, ranks: int, counts: list[int]) -> None:
    shares = [share_units(total, ranks, rank) for rank in range(ranks)]
    assert [count for _, count in shares] == counts
    assert [first for first, _ in shares] == [sum(counts[:rank]) for rank in range(ranks)]


def test_fewer_hidden_units_than_ranks_are_refused() -> None:
    with pytest.raises(ModelUnsupported, match="2 hidden units of each MLP cannot be split over --tp-size 3"):
        share_units(2, 3, 0)


def test_neighbouring_heads_are_one_run() -> None:
    assert runs((0, 1, 4), 8) == ((0, 16), (32, 8))
    assert runs((2, 2), 8) == ((16, 8), (16, 8))
    assert [share_evenly(5, 3, rank) for rank in range(3)] == [range(2), range(2, 4), range(4, 5)]
