"""The sampler against plain reference implementations, and its independence of the batch."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ullm.model.kernels.cpu.kernels import load_kernels
from ullm.model.sampling.choose import ChooseTokens, choose_tokens, splitmix64, uniform
from ullm.model.sampling.sampler import Sampler
from ullm.sampling import SamplingParams

VOCAB = 1000
EOS = 7


@pytest.fixture(params=["torch", "kernels"])
def draw(request: pytest.FixtureRequest) -> ChooseTokens:
    """Each implementation."""
    if request.param == "torch":
        return choose_tokens
    kernels = load_kernels(torch.float32)
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    return lambda logits, *how: kernels.choose_tokens(logits.float(), *how)


def sampler(vocab: int = VOCAB, choose: ChooseTokens = choose_tokens) -> Sampler:
    return Sampler(vocab, torch.device("cpu"), (EOS,), choose)


def sample_one(
    logits: torch.Tensor,
    params: SamplingParams,
    tokens: tuple[int, ...] = (1,),
    choose: ChooseTokens = choose_tokens,
) -> int:
    """One token for a fresh sequence whose prompt is ``tokens``."""
    fresh = sampler(len(logits), choose)
    fresh.add(0, params, list(tokens), len(tokens))
    return int(fresh.sample(logits[None], [0])[0])


def logits_of(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(shape or (VOCAB,), generator=torch.Generator().manual_seed(seed)) * scale


# --- draws -------------------------------------------------------------------------------------


def test_uniform_is_the_same_everywhere() -> None:
    """Against published outputs, and values a resumed request must find again in any later release."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567, index) for index in range(4)] == published
    uniforms = [uniform(42, index) for index in range(3)]
    assert uniforms == [0.34329192209867343, 0.9557467261317436, 0.48634953628166855]
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_uniform_is_uniform_and_seeds_are_unrelated() -> None:
    uniforms = np.array([[uniform(seed, index) for index in range(500)] for seed in range(100)])
    assert ((uniforms >= 0) & (uniforms < 1)).all()
    counts = np.histogram(uniforms, bins=64, range=(0, 1))[0]
    assert chi_square(counts, np.full(64, uniforms.size / 64)) < 3
    along, across = uniforms[:, 1:] - 0.5, uniforms[1:] - 0.5
    assert abs((along * (uniforms[:, :-1] - 0.5)).mean()) < 0.002
    assert abs((across * (uniforms[:-1] - 0.5)).mean()) < 0.002


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations by which the statistic exceeds its mean; bins of few are pooled."""
    order = np.argsort(expected)
    small = order[np.cumsum(expected[order]) < 20]
    keep = np.setdiff1d(order, small)
    counts = np.append(counts[keep], counts[small].sum())
    expected = np.append(expected[keep], expected[small].sum() or 1e-9)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(keep) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_distributed_as_the_softmax(draw: ChooseTokens, temperature: float) -> None:
    logits, size = logits_of(1, 200, scale=2.0), 20_000
    tokens = draw(
        logits.expand(size, -1), [(temperature, 0, 1.0, 0.0)] * size, [uniform(5, i) for i in range(size)]
    )
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * size
    assert chi_square(np.bincount(tokens.numpy(), minlength=200), expected) < 3


def test_draw_inverts_the_cumulative_distribution(draw: ChooseTokens) -> None:
    for vocab in (1, 5, 128, 129, 1000, 4096):
        logits = logits_of(vocab, vocab)
        uniforms = [0.0, *(uniform(vocab, index) for index in range(200)), 1 - 2**-53]
        tokens = draw(logits.expand(len(uniforms), -1), [(1.0, 0, 1.0, 0.0)] * len(uniforms), uniforms)
        cumulated = np.cumsum(torch.softmax(logits, -1).double().numpy())
        expected = np.searchsorted(cumulated, np.array(uniforms) * cumulated[-1], side="right")
        assert tokens.tolist() == expected.tolist()


def test_tokens_without_probability_are_never_drawn(draw: ChooseTokens) -> None:
    logits = torch.full((300,), -math.inf)
    logits[[3, 140, 297]] = 0.0
    uniforms = [0.0, 0.3, 1 / 3, 0.5, 2 / 3, 0.9, 1 - 2**-53]
    tokens = draw(logits.expand(len(uniforms), -1), [(1.0, 0, 1.0, 0.0)] * len(uniforms), uniforms)
    assert set(tokens.tolist()) == {3, 140, 297}


# --- filters -----------------------------------------------------------------------------------


def kept(
    draw: ChooseTokens, logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> set[int]:
    """The tokens that can be drawn: a scan of the distribution fine enough to meet each of them."""
    scan = [step / 20_000 for step in range(20_000)]
    rows = 500
    filters = [(temperature, top_k, top_p, min_p)] * rows
    found: set[int] = set()
    for start in range(0, len(scan), rows):
        tokens = draw(logits.expand(rows, -1), filters, scan[start : start + rows])
        found.update(tokens.tolist())
    return found


def reference(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The same in plain Python; equals of the last token kept are kept."""
    peak = float(logits.max())
    weights = [math.exp((value - peak) / temperature) for value in logits.double().tolist()]
    ranked = sorted(weights, reverse=True)
    if top_k:
        ranked = ranked[:top_k]
    total, running, last = math.fsum(ranked), 0.0, ranked[-1]
    for weight in ranked if top_p < 1 else []:
        running += weight
        if running >= top_p * total:
            last = weight
            break
    floor = max(last, min_p * max(weights))
    return {token for token, weight in enumerate(weights) if weight >= floor}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 1, 1.0, 0.0),
        (1.0, 10, 1.0, 0.0),
        (0.7, 60, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (1.5, 0, 0.5, 0.0),
        (1.0, 0, 1e-9, 0.0),
        (1.0, 0, 1.0, 0.05),
        (2.0, 0, 1.0, 0.3),
        (1.0, 0, 1.0, 1.0),
        (1.0, 20, 0.8, 0.0),
        (1.0, 40, 0.95, 0.02),
        (0.8, 0, 0.95, 0.1),
    ],
)
def test_filters_keep_what_the_reference_keeps(
    draw: ChooseTokens, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    for seed in range(3):
        logits = logits_of(seed, 80, scale=1.5)
        expected = reference(logits, temperature, top_k, top_p, min_p)
        assert kept(draw, logits, temperature, top_k, top_p, min_p) == expected


def test_filters_keep_what_those_of_transformers_keep(draw: ChooseTokens) -> None:
    generator = random.Random(3)
    for seed in range(8):
        logits = logits_of(seed, 60, scale=1.5)
        top_k, top_p = generator.randrange(1, 60), generator.uniform(0.3, 0.99)
        min_p, temperature = generator.uniform(0.001, 0.2), generator.uniform(0.5, 2)
        scores = logits[None]
        for warper in (
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ):
            scores = warper(torch.tensor([[0]]), scores)
        expected = set(scores[0].isfinite().nonzero()[:, 0].tolist())
        assert kept(draw, logits, temperature, top_k, top_p, min_p) == expected


@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_nucleus_of_any_size(draw: ChooseTokens, scale: float) -> None:
    """Flat distributions need more candidates than are sorted first."""
    logits = logits_of(9, 6000, scale=scale)
    filters, uniforms = [(1.0, 0, 0.9, 0.0)] * 400, [index / 400 for index in range(400)]
    tokens = draw(logits.expand(400, -1), filters, uniforms)
    weights = torch.softmax(logits, -1).double()
    ranked, order = weights.sort(descending=True)
    count = int((ranked.cumsum(0) < 0.9).sum()) + 1
    inside = torch.zeros(6000, dtype=torch.float64).index_copy(0, order[:count], ranked[:count])
    cumulated = inside.cumsum(0)
    expected = torch.searchsorted(cumulated, torch.tensor(uniforms).double() * cumulated[-1], right=True)
    assert tokens.tolist() == expected.tolist()
    assert count > {0.05: 4096, 1.0: 256, 4.0: 0}[scale]


def test_ties_do_not_depend_on_the_order_of_a_sort(draw: ChooseTokens) -> None:
    logits = torch.zeros(512).bfloat16()
    logits[100:140] = 2.0
    assert kept(draw, logits, 1.0, 7, 1.0, 0.0) == set(range(100, 140))
    assert kept(draw, logits, 1.0, 0, 0.01, 0.0) == set(range(100, 140))


# --- extremes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_very_cold_is_greedy(draw: ChooseTokens, temperature: float) -> None:
    for seed in range(20):
        logits = logits_of(seed)
        token = sample_one(logits, SamplingParams(temperature=temperature, seed=seed), choose=draw)
        assert token == int(logits.argmax())


def test_rows_have_filters_of_their_own(draw: ChooseTokens) -> None:
    """Greedy ones among them; as each alone."""
    logits = logits_of(5, 9, VOCAB)
    filters = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (2.0, 40, 1.0, 0.0)] * 2
    filters.append((1.5, 200, 0.5, 0.01))
    uniforms = [uniform(1, row) for row in range(9)]
    together = draw(logits, filters, uniforms).tolist()
    alone = [draw(logits[row : row + 1], filters[row : row + 1], uniforms[row : row + 1]) for row in range(9)]
    assert together == [int(token) for token in alone]
    assert [together[0], together[4]] == [int(logits[0].argmax()), int(logits[4].argmax())]


def test_very_hot_is_uniform(draw: ChooseTokens) -> None:
    tokens = draw(
        logits_of(4, 50).expand(5000, -1),
        [(100.0, 0, 1.0, 0.0)] * 5000,
        [uniform(1, i) for i in range(5000)],
    )
    assert chi_square(np.bincount(tokens, minlength=50), np.full(50, 100.0)) < 4


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 10**9},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"top_k": VOCAB, "top_p": 0.999999999, "min_p": 1e-30},
        {"logit_bias": {10**7: 100.0, 3: 5.0}},
        {"stop_token_ids": (10**7,), "min_tokens": 5},
        {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": 2.0},
    ],
)
@pytest.mark.parametrize("kind", ["plain", "huge", "mostly_impossible", "all_impossible"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_give_tokens_of_the_vocabulary(
    options: dict[str, Any], kind: str, dtype: torch.dtype
) -> None:
    logits = logits_of(6)
    if kind == "huge":
        logits *= 5000
    elif kind != "plain":
        logits[:] = -math.inf
    if kind == "mostly_impossible":
        logits[[5, 500]] = torch.tensor([1.0, 2.0])
    for temperature in (0.0, 1e-6, 1.0, 100.0):
        params = SamplingParams(temperature=temperature, seed=3, **options)
        token = sample_one(logits.to(dtype), params, (1, 2, 3))
        assert 0 <= token < VOCAB
        if kind == "mostly_impossible" and 3 not in params.logit_bias:
            assert token in (5, 500)


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(VOCAB, dtype=torch.bfloat16)
    logits[[40, 300, 900]] = 1.0
    assert sample_one(logits, SamplingParams(temperature=0)) == 40


# --- penalties, bias, min_tokens ---------------------------------------------------------------


def penalised(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]
) -> torch.Tensor:
    """Penalties by transformers and by OpenAI's formula, then the bias."""
    seen = torch.tensor([prompt + output])
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, logits[None].clone())[0]
    for token in set(output):
        scores[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    return scores


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"presence_penalty": -1.0, "frequency_penalty": 0.4},
        {"frequency_penalty": 2.0, "repetition_penalty": 1.1, "logit_bias": {3: 4.0, 5: -100.0}},
        {"logit_bias": {11: 100.0}},
    ],
)
def test_penalties_and_bias_match_the_reference_over_a_whole_generation(options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, logprobs=2, **options)
    prompt, output = [1, 2, 3, 2, 9], []
    own = sampler(40)
    own.add(0, params, prompt, len(prompt))
    for step in range(300):  # beyond the first capacity of the history
        logits = logits_of(step, 40)
        token = own.sample(logits[None], [0])
        expected = penalised(logits, params, prompt, output)
        assert int(token) == int(expected.argmax())
        (entry,) = own.logprobs(logits[None], [0], token)
        assert entry is not None
        assert entry.logprob == pytest.approx(float(torch.log_softmax(expected, -1).max()), abs=1e-4)
        output.append(int(token))


def test_logits_are_left_as_they_are() -> None:
    logits = logits_of(1, 3, VOCAB)
    before = logits.clone()
    own = sampler()
    own.add(0, SamplingParams(temperature=0, logit_bias={1: 9.0}), [1], 1)
    own.add(1, SamplingParams(seed=1, repetition_penalty=2.0), [1], 1)
    own.add(2, SamplingParams(seed=1, min_tokens=3, top_p=0.5), [1], 1)
    own.sample(logits, [0, 1, 2])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_impossible_before_min_tokens(temperature: float) -> None:
    logits = torch.zeros(VOCAB)
    logits[[EOS, 20]] = 50.0
    params = SamplingParams(
        temperature=temperature, seed=1, min_tokens=3, stop_token_ids=(20,), logit_bias={EOS: 100.0}
    )
    own = sampler()
    own.add(0, params, [1, 2], 2)
    tokens = [int(own.sample(logits[None], [0])) for _ in range(5)]
    assert not {EOS, 20} & set(tokens[:3])
    assert tokens[3:] == [EOS, EOS]
    own.add(0, params, [1, 2, *tokens[:3]], 2)  # resumed: three are generated already
    assert int(own.sample(logits[None], [0])) == EOS


def test_banning_every_token_bans_none() -> None:
    params = SamplingParams(temperature=0, min_tokens=9, stop_token_ids=tuple(range(VOCAB)))
    logits = logits_of(2)
    assert sample_one(logits, params) == int(logits.argmax())


# --- independence of the batch -----------------------------------------------------------------

VARIETY: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 0, "logit_bias": {4: 3.0}, "min_tokens": 4},
    {},
    {"temperature": 0.6},
    {"temperature": 1.3, "top_p": 0.9},
    {"top_p": 0.2, "min_p": 0.1},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 700},
    {"min_p": 0.05, "presence_penalty": 1.0},
    {"frequency_penalty": 0.7, "top_k": 30, "temperature": 0.9},
    {"logit_bias": {1: 2.0, 9: -50.0}, "top_p": 0.95},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_tokens": 6},
]
STEPS = 12


def row_logits(seq_id: int, index: int) -> torch.Tensor:
    """Return the logits of a sequence at a token index, rounded so that there are many ties."""
    return logits_of(1000 * seq_id + index, VOCAB, scale=2.5).bfloat16()


def variety(seq_id: int) -> SamplingParams:
    return SamplingParams(seed=seq_id // 2, logprobs=3, **VARIETY[seq_id % len(VARIETY)])


def alone(seq_id: int) -> list[int]:
    own = sampler()
    own.add(seq_id, variety(seq_id), [1, 2, 3], 3)
    return [int(own.sample(row_logits(seq_id, index)[None], [seq_id])) for index in range(STEPS)]


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Random batches in random order, with joins, leaves and resumptions, against each row alone."""
    chance = random.Random(17)
    expected = {seq_id: alone(seq_id) for seq_id in range(28)}
    outputs: dict[int, list[int]] = {seq_id: [] for seq_id in expected}
    own = sampler()
    known: set[int] = set()
    while unfinished := [seq_id for seq_id, output in outputs.items() if len(output) < STEPS]:
        for seq_id in chance.sample(sorted(known), len(known) // 4):  # preempted, or its worker was lost
            own.forget(seq_id)
            known.discard(seq_id)
        batch = chance.sample(unfinished, chance.randint(1, len(unfinished)))
        for seq_id in set(batch) - known:
            own.add(seq_id, variety(seq_id), [1, 2, 3, *outputs[seq_id]], 3)
            known.add(seq_id)
        logits = torch.stack([row_logits(seq_id, len(outputs[seq_id])) for seq_id in batch])
        for seq_id, token in zip(batch, own.sample(logits, batch).tolist(), strict=True):
            outputs[seq_id].append(token)
    assert outputs == expected


def test_logprobs_do_not_depend_on_the_batch() -> None:
    together, rows = sampler(), list(range(28))
    for seq_id in rows:
        together.add(seq_id, variety(seq_id), [1, 2, 3], 3)
    logits = torch.stack([row_logits(seq_id, 0) for seq_id in rows])
    found = together.logprobs(logits, rows, together.sample(logits, rows))
    for seq_id in rows:
        own = sampler()
        own.add(seq_id, variety(seq_id), [1, 2, 3], 3)
        single = row_logits(seq_id, 0)[None]
        (entry,) = own.logprobs(single, [seq_id], own.sample(single, [seq_id]))
        assert found[seq_id] == entry


def test_seeds_and_indices_give_different_texts() -> None:
    logits = logits_of(3, scale=1.0).expand(3, -1)
    own = sampler()
    for seq_id in range(3):
        own.add(seq_id, SamplingParams(seed=seq_id), [1], 1)
    texts = list(zip(*(own.sample(logits, [0, 1, 2]).tolist() for _ in range(20)), strict=True))
    assert len({*texts}) == 3
    assert all(len({*text}) > 5 for text in texts)


def test_without_a_seed_texts_differ() -> None:
    logits = logits_of(3, scale=0.5).expand(2, -1)
    own = sampler()
    own.add(0, SamplingParams(), [1], 1)
    own.add(1, SamplingParams(), [1], 1)
    first, second = zip(*(own.sample(logits, [0, 1]).tolist() for _ in range(12)), strict=True)
    assert first != second


def test_many_penalised_sequences_come_and_go() -> None:
    """Slots are used again, and what a slot held before does not show."""
    own = sampler(50)
    params = SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=1.0)
    for start in range(0, 60, 3):
        batch = list(range(start, start + 20))
        for seq_id in batch:
            own.add(seq_id, params, [1], 1)
        logits = torch.stack([logits_of(seq_id, 50, scale=0.1) for seq_id in batch])
        first, second = own.sample(logits, batch), own.sample(logits, batch)
        assert torch.equal(first, logits.argmax(-1))
        assert not (first == second).any()
        for seq_id in batch:
            own.forget(seq_id)
    own.forget(12345)


# --- log probabilities -------------------------------------------------------------------------


def test_logprobs_of_the_rows_that_ask() -> None:
    logits = logits_of(8, 4, VOCAB)
    own = sampler()
    for seq_id, count in enumerate((None, 0, 5, 20)):
        own.add(seq_id, SamplingParams(seed=seq_id, temperature=0.5, logprobs=count), [1], 1)
    tokens = own.sample(logits, [0, 1, 2, 3])
    entries = own.logprobs(logits, [0, 1, 2, 3], tokens)
    assert entries[0] is None
    expected = torch.log_softmax(logits, -1)  # at temperature 1, whatever the request's is
    for row, count in ((1, 0), (2, 5), (3, 20)):
        entry, token = entries[row], int(tokens[row])
        assert entry is not None
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        assert entry.rank == int((logits[row] > logits[row, token]).sum()) + 1
        values, ids = expected[row].topk(20)
        assert [token_id for token_id, _ in entry.top] == ids[:count].tolist()
        assert [value for _, value in entry.top] == pytest.approx(values[:count].tolist(), abs=1e-5)


def test_logprobs_when_no_row_asks() -> None:
    logits = logits_of(8, 2, VOCAB)
    own = sampler()
    own.add(0, SamplingParams(temperature=0), [1], 1)
    own.add(1, SamplingParams(seed=2, presence_penalty=1.0), [1], 1)
    assert own.logprobs(logits, [0, 1], own.sample(logits, [0, 1])) == [None, None]


def test_prompt_logprobs() -> None:
    logits = logits_of(8, 150, VOCAB)
    following = [
        int(token) for token in torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(1))
    ]
    entries = sampler().prompt_logprobs(logits, following, 2)
    expected = torch.log_softmax(logits, -1)
    assert [entry.token_id for entry in entries] == following
    for row, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(expected[row, following[row]]), abs=1e-5)
        assert [token for token, _ in entry.top] == expected[row].topk(2).indices.tolist()
    assert sampler().prompt_logprobs(logits[:0], [], 2) == []
