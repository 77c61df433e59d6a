"""Constrained rows of the sampler: masks, ends, drafts, resumption, failures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.grammars.test_matcher import END, NO, SIZE, TOOL, WORDS, YES
from ullm.grammars.compiler import compile_grammar
from ullm.grammars.matcher import MatcherFactory, Vocabulary
from ullm.grammars.structured_outputs import StructuredOutputs
from ullm.model.memory.fetch import Fetched
from ullm.model.sampling.choose import choose_tokens
from ullm.model.sampling.constraints import Constraints
from ullm.model.sampling.sampler import Sampler
from ullm.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)


def make_factory() -> MatcherFactory:
    tokens = [bytes([byte]) for byte in range(256)] + list(WORDS)
    return MatcherFactory(Vocabulary(tokens, [TOOL], [END], lambda text: list(text.encode())), SIZE)


@pytest.fixture
def sampler() -> Iterator[Sampler]:
    constraints = Constraints(make_factory, SIZE)
    made = Sampler(SIZE, torch.device("cpu"), (END,), choose_tokens, constraints)
    yield made
    made.close()


def choice(*texts: str) -> str:
    return compile_grammar(StructuredOutputs(choice=texts))


def step(sampler: Sampler, logits: torch.Tensor, seq_ids: list[int]) -> list[int]:
    tokens = sampler.sample(logits, seq_ids)
    sampler.follow(Fetched(tokens), {seq: (row, 1) for row, seq in enumerate(seq_ids)})
    return tokens.tolist()


def rising(rows: int) -> torch.Tensor:
    """Logits by which a later token is always likelier."""
    return torch.arange(SIZE, dtype=torch.float32).repeat(rows, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constrained_rows_beside_free_ones(sampler: Sampler, dtype: torch.dtype) -> None:
    sampler.add(0, GREEDY, [1], 1, choice("yes", "no"))
    sampler.add(1, GREEDY, [1], 1)
    sampler.add(2, GREEDY, [1], 1, choice("abc"))
    logits = torch.zeros(3, SIZE, dtype=dtype)
    logits[:, SIZE - 1], logits[0, YES], logits[0, ord("n")] = 5, 1, 2
    before = logits.clone()
    assert step(sampler, logits, [0, 1, 2]) == [ord("n"), SIZE - 1, ord("a")]
    assert torch.equal(logits, before)
    assert step(sampler, logits, [0, 1, 2]) == [ord("o"), SIZE - 1, ord("b")]
    assert step(sampler, logits, [0, 1, 2]) == [END, SIZE - 1, ord("c")]


def test_a_resumed_sequence_goes_on_inside_its_grammar(sampler: Sampler) -> None:
    sampler.add(0, GREEDY, [9, *b"ab"], 1, choice("abc", "xyz"))
    assert step(sampler, rising(1), [0]) == [ord("c")]
    sampler.add(0, GREEDY, [9], 1, choice("abc", "xyz"))  # after a preemption, under the same number
    assert step(sampler, rising(1), [0]) == [ord("x")]


def test_sampling_stays_inside(sampler: Sampler) -> None:
    texts = ["yes", "no", "maybe"]
    for seed in range(20):
        sampler.add(seed, SamplingParams(seed=seed), [1], 1, choice(*texts))
    seen = set()
    answers: dict[int, bytes] = {seed: b"" for seed in range(20)}
    while answers:
        live = list(answers)
        for seq_id, token in zip(live, step(sampler, torch.zeros(len(live), SIZE), live), strict=True):
            if token == END:
                seen.add(answers.pop(seq_id).decode())
            else:
                answers[seq_id] += WORDS[token - 256] if token >= 256 else bytes([token])
    assert seen == set(texts)


def test_the_end_comes_before_min_tokens_if_nothing_else_is_left(sampler: Sampler) -> None:
    params = SamplingParams(temperature=0, min_tokens=9)
    sampler.add(0, params, [1], 1, choice("no", "yes"))
    sampler.add(1, params, [1], 1, compile_grammar(StructuredOutputs(regex="n+")))
    logits = torch.zeros(2, SIZE)
    logits[:, END], logits[:, NO] = 9, 5
    assert step(sampler, logits, [0, 1]) == [NO, ord("n")]
    assert step(sampler, logits, [0, 1]) == [END, ord("n")], "where there is something else, it waits"


def test_drafts_within_a_grammar(sampler: Sampler) -> None:
    sampler.add(0, GREEDY, [1], 1, compile_grammar(StructuredOutputs(regex="a+b")))
    sampler.add(1, GREEDY, [1], 1)
    logits = rising(4)
    logits[1, ord("b")] = logits[2, ord("a")] = 1000
    tokens = sampler.sample(logits, [0, 0, 0, 1], [0, 1, 2, 0], {0: [ord("a"), ord("b")]})
    assert tokens.tolist() == [ord("a"), ord("b"), END, SIZE - 1]
    sampler.advance(0, 1)
    sampler.follow(Fetched(tokens), {0: (0, 2), 1: (3, 1)})
    assert step(sampler, rising(2), [0, 1]) == [END, SIZE - 1], "both accepted tokens count"


def test_log_probabilities_are_those_of_the_model(sampler: Sampler) -> None:
    params = SamplingParams(temperature=0, logprobs=2)
    sampler.add(0, params, [1], 1, choice("no", "yes"))
    logits = rising(1)
    logits[0, NO] = 258.5
    tokens = sampler.sample(logits, [0])
    (entry,) = sampler.logprobs(logits, [0], tokens)
    assert entry is not None
    assert entry.token_id == NO
    assert entry.logprob == pytest.approx(float(torch.log_softmax(logits[0], -1)[NO]), abs=1e-4)
    assert entry.rank == SIZE - NO


def test_the_tokenizer_is_read_ahead_and_once_more_if_that_failed() -> None:
    read, failures = [0], [OSError("not there yet")]

    def make() -> MatcherFactory:
        read[0] += 1
        if failures:
            raise failures.pop()
        return make_factory()

    for count in (2, 1):
        constraints = Constraints(make, SIZE)
        constraints.prepare()
        made = Sampler(SIZE, torch.device("cpu"), (END,), choose_tokens, constraints)
        made.add(7, GREEDY, [1], 1)
        made.sample(rising(1), [7])  # what is not constrained does not wait, nor fail
        made.add(0, GREEDY, [1], 1, choice("yes"))
        assert step(made, rising(1), [0]) == [ord("y")]
        made.close()
        assert read == [count]
        read[0], failures[:] = 0, []


def test_a_tokenizer_that_cannot_be_read_fails_the_request_only() -> None:
    def broken() -> MatcherFactory:
        raise FileNotFoundError("tokenizer.json has vanished")

    sampler = Sampler(SIZE, torch.device("cpu"), (END,), choose_tokens, Constraints(broken, SIZE))
    sampler.add(0, GREEDY, [1], 1, choice("no"))
    sampler.add(1, GREEDY, [1], 1)
    assert step(sampler, rising(2), [0, 1])[1] == SIZE - 1
    assert sampler.errors([0, 1]) == {0: "FileNotFoundError: tokenizer.json has vanished"}
    sampler.close()


def test_allowed_tokens_and_bad_words_beside_free_rows(sampler: Sampler) -> None:
    allowed = SamplingParams(temperature=0, allowed_token_ids=(ord("a"), ord("b")))
    words = SamplingParams(temperature=0, bad_word_ids=((SIZE - 1, SIZE - 1), (ord("z"),)))
    sampler.add(0, allowed, [1], 1)
    sampler.add(1, words, [1], 1)
    sampler.add(2, GREEDY, [1], 1)
    assert step(sampler, rising(3), [0, 1, 2]) == [ord("b"), SIZE - 1, SIZE - 1]
    assert step(sampler, rising(3), [0, 1, 2]) == [ord("b"), SIZE - 2, SIZE - 1]
    assert step(sampler, rising(3), [0, 1, 2]) == [ord("b"), SIZE - 1, SIZE - 1]
    sampler.add(1, words, [1, SIZE - 1], 1)  # resumed
    assert step(sampler, rising(1), [1]) == [SIZE - 2]
    assert sampler.errors([0, 1, 2]) == {}
