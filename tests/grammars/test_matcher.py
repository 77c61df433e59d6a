"""Matchers over a vocabulary of bytes and some words."""

from __future__ import annotations

import numpy as np
import pytest

from ullm.grammars import matcher as matchers
from ullm.grammars.compiler import compile_grammar
from ullm.grammars.matcher import GrammarMatcher, MatcherFactory, Vocabulary
from ullm.grammars.structured_outputs import StructuredOutputs

WORDS = (b"<end>", b"<tool>", b"yes", b"no", b'{"', b"", b"")
END, TOOL, YES, NO, OPEN = range(256, 261)
SIZE = 256 + len(WORDS)


@pytest.fixture
def factory() -> MatcherFactory:
    tokens = [bytes([byte]) for byte in range(256)] + list(WORDS)
    return MatcherFactory(Vocabulary(tokens, [TOOL], [END], lambda text: list(text.encode())), SIZE)


def allowed(matcher: GrammarMatcher) -> set[int]:
    mask = np.zeros(-(-SIZE // 32), np.int32)
    matcher.fill(mask)
    return bits(mask)


def bits(mask: np.ndarray) -> set[int]:
    return set(np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist())


def make(factory: MatcherFactory, outputs: StructuredOutputs) -> GrammarMatcher:
    return factory.make(compile_grammar(outputs, ["<tool>"]))


def test_choices_end_with_the_end_token(factory: MatcherFactory) -> None:
    matcher = make(factory, StructuredOutputs(choice=["yes", "no"]))
    assert allowed(matcher) == {ord("y"), ord("n"), YES, NO}
    matcher.consume([ord("y")])
    assert allowed(matcher) == {ord("e")}
    matcher.consume(list(b"es"))
    assert allowed(matcher) == {END}
    matcher.consume([END, ord("x")])  # what comes after the end is ignored
    assert allowed(matcher) == {END}
    assert matcher.error == ""


def test_special_tokens_only_where_they_are_named(factory: MatcherFactory) -> None:
    assert TOOL not in allowed(make(factory, StructuredOutputs(regex="(.|\n)*")))
    assert allowed(make(factory, StructuredOutputs(grammar='start: <tool> "a"'))) == {TOOL}


def test_a_matcher_is_a_function_of_its_tokens(factory: MatcherFactory) -> None:
    outputs = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}})
    matcher = make(factory, outputs)
    for byte in b'{"a": 12':
        matcher.consume([byte])
        allowed(matcher)
    resumed = make(factory, outputs)
    resumed.consume([OPEN, *b'a": 12'])
    assert allowed(resumed) == allowed(matcher) >= set(b"0123456789}")


def test_drafts_are_checked_token_by_token(factory: MatcherFactory) -> None:
    matcher = make(factory, StructuredOutputs(regex="a+b"))
    masks = np.full((4, -(-SIZE // 32)), -1, np.int32)
    matcher.fill_ahead([ord("a"), ord("x"), ord("a")], masks)
    assert [bits(mask) for mask in masks[:2]] == [{ord("a")}, {ord("a"), ord("b")}]
    assert (masks[2:] == -1).all(), "nothing is known after a token that is not allowed"
    assert allowed(matcher) == {ord("a")}, "the matcher itself has not moved"


def test_the_last_grammars_are_kept(factory: MatcherFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matchers, "CACHED_GRAMMARS", 2)
    for letter in "abab":
        matcher = make(factory, StructuredOutputs(choice=[letter]))
        assert allowed(matcher) == {ord(letter)}, "a cached grammar has not moved"
        matcher.consume([ord(letter)])
    make(factory, StructuredOutputs(choice=["c"]))
    assert [key.count('"b"') for key in factory._compiled] == [1, 0]


def test_a_grammar_of_great_cost_is_an_error_and_no_crash(factory: MatcherFactory) -> None:
    grammar = "start: " + " ".join(f"a{i}?" for i in range(1100)) + "\n"
    grammar += "\n".join(f'a{i}: "x" | "x" a{i}' for i in range(1100))
    matcher = make(factory, StructuredOutputs(grammar=grammar))
    for _ in range(50):
        seen = allowed(matcher)
        matcher.consume([ord("x")])
        if matcher.error:
            break
    assert matcher.error
    assert "\n" not in matcher.error
    assert len(allowed(matcher)) == SIZE + (-SIZE % 32), "after an error nothing is constrained"
    assert seen
