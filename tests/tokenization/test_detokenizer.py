"""Text deltas and stop strings, wherever tokens break them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullm.tokenization.detokenizer import TextAssembler
from ullm.tokenization.stop_strings import StopString


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


def test_a_stop_string_that_ended_too_early_is_not_found_later() -> None:
    """Though it is part of what is held back for the other one."""
    assert play(["xab", "q"], "ab", "xabyyyy", min_tokens=1) == ("xabq", None, 2)


class CountingText(str):
    """A text that counts how often its characters are looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> str:
        CountingText.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("stop_of", [lambda text: text + "b", lambda text: text[1:] + "b", lambda _: "aab"])
def test_the_search_is_linear_in_the_text(stop_of: Any) -> None:
    """With fifteen stop strings as long as the text, the worst of which repeat themselves."""
    looks = []
    for length in (500, 1000):
        CountingText.looks = 0
        stops = [CountingText(stop_of("a" * length)) for _ in range(15)]
        shown, stop, _ = play(["a"] * length, *stops)
        assert (shown, stop) == ("a" * length, None)
        looks.append(CountingText.looks)
    assert looks[1] <= 2.1 * looks[0]
    assert looks[1] <= 10 * 15 * 1000


def test_choices_share_what_is_known_about_a_stop_string() -> None:
    stop = StopString("aab" * 5)
    for _ in range(3):
        text = TextAssembler(Pieces(["aab" * 5]), [stop])
        assert text.push([0]).stop == "aab" * 5


@pytest.mark.parametrize("include_stop", [False, True])
def test_special_tokens_are_part_of_stop_strings_but_not_of_the_text(include_stop: bool) -> None:
    pieces = ["one ", "", "two ", "", "\nfo", "o!"]  # 1 and 3 are special tokens
    text = TextAssembler(
        Pieces(pieces), ["<end>\nfoo"], hidden={1: "<end>", 3: "<end>"}, include_stop=include_stop
    )
    shown = [text.push([token]) for token in range(len(pieces))]
    assert [delta.text for delta in shown[:5]] == ["one ", "", "two ", "", ""]
    assert (shown[5].text, shown[5].stop) == ("<end>\nfoo" if include_stop else "", "<end>\nfoo")
    over = TextAssembler(Pieces(pieces), ["<end>\nfoo"], hidden={1: "<end>"})
    assert over.push([0, 1]).text + over.flush().text == "one ", "what is held back is not shown"
