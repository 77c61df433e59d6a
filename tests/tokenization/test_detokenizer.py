"""Text deltas and stop strings, wherever tokens break them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullm.tokenization.detokenizer import TextAssembler


class Pieces:
    """A decoder whose token ``i`` is the text ``pieces[i]``; the last ``held`` is only flushed."""

    def __init__(self, pieces: list[str], held: str = "") -> None:
        self.pieces, self.held = pieces, held

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(self.pieces[token_id] for token_id in token_ids)

    def flush(self) -> str:
        return self.held


def play(
    pieces: list[str], *stop: str, held: str = "", batch: int = 1, **options: Any
) -> tuple[str, str | None, int]:
    """The whole text, the stop string that ended it, and how many tokens were used."""
    text = TextAssembler(Pieces(pieces, held), stop, **options)
    shown, used = "", 0
    for start in range(0, len(pieces), batch):
        delta = text.push(range(start, min(start + batch, len(pieces))))
        shown, used = shown + delta.text, used + delta.num_tokens
        if delta.stop is not None:
            return shown, delta.stop, used
    rest = text.flush()
    return shown + rest.text, rest.stop, used


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["Hel", "lo wo", "rld"], (), ("Hello world", None, 3)),
        (["a", "ST", "OP", "b"], ("STOP",), ("a", "STOP", 3)),
        (["a S", "T", "AY", " STO", "P"], ("STOP",), ("a STAY ", "STOP", 5)),
        (["one END two"], ("END",), ("one ", "END", 1)),
        (["x", "yz"], ("zz", "yz"), ("x", "yz", 2)),
        (["ab", "cd"], ("cd", "bc"), ("a", "bc", 2)),
        (["ST", "O"], ("STOP",), ("STO", None, 2)),
        (["aab"], ("ab",), ("a", "ab", 1)),
        (["a", "a", "b"], ("aab",), ("", "aab", 3)),
        (["日", "本", "語"], ("本語",), ("日", "本語", 3)),
    ],
)
def test_the_text_ends_before_the_earliest_stop_string(
    pieces: list[str], stops: tuple[str, ...], expected: tuple[str, str | None, int], batch: int
) -> None:
    assert play(pieces, *stops, batch=batch) == expected


def test_the_stop_string_may_be_kept() -> None:
    assert play(["a", "EN", "Db"], "END", include_stop=True) == ("aEND", "END", 3)


def test_a_stop_string_within_the_first_tokens_does_not_count() -> None:
    assert play(["END", "b", "END"], "END", min_tokens=1) == ("ENDb", "END", 3)


def test_what_could_become_a_stop_string_is_held_back() -> None:
    text = TextAssembler(Pieces(["a", "ST", "x"]), ["STOP"])
    assert [text.push([token]).text for token in range(3)] == ["a", "", "STx"]


def test_bytes_held_by_the_decoder_come_at_the_end() -> None:
    assert play(["a"], held="\ufffd") == ("a\ufffd", None, 1)
    assert play(["a"], "a\ufffd", held="\ufffd") == ("", "a\ufffd", 1)


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_it_is_the_same_as_searching_the_whole_text(pieces: list[str], stops: list[str], batch: int) -> None:
    text, stop, _ = play(pieces, *stops, batch=batch)
    whole, first = "", None
    for piece in pieces:  # a stop string counts as soon as it is complete
        whole += piece
        hits = [(whole.find(s), s) for s in stops if s in whole]
        if hits:
            first = min(hits, key=lambda hit: hit[0])
            break
    assert (text, stop) == ((whole[: first[0]], first[1]) if first else (whole, None))
