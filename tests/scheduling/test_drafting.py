"""Drafts from a sequence's own tokens, and how a scheduler plans and verifies them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Values
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullm.config import EngineConfig
from ullm.protocol.messages import RankSpec, Sampled, ScheduledSequence, Start, Step, StepResult
from ullm.sampling import SamplingParams
from ullm.scheduling.block_pool import BlockPool
from ullm.scheduling.drafting import WAIT_COST, WINDOW, Drafter, can_draft, find_following, price
from ullm.scheduling.scheduler import Scheduler
from ullm.scheduling.sequence import Sequence
from ullm.testing import ScriptedRunner, ScriptedSettings, scripted_tokens

BLOCK, EOS = 4, 2
REPETITIVE = [10, 11, 12, 13, 14, 15, 16, 17, 10, 11, 12]


def following(tokens: Values[int]) -> int | None:
    return find_following(bytearray(array("i", tokens).tobytes()))


# --- finding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], None),
        ([5], None),
        ([5, 5], None),
        ([5, 5, 5], 2),
        ([5, 6, 7, 8], None),
        ([5, 6, 7, 5, 6], 2),
        ([5, 6, 7, 5, 6, 8, 5, 6], 5),  # the latest of two
        ([4, 5, 6, 7, 9, 5, 6, 8, 4, 5, 6], 3),  # the longest of two
        ([1 << 16, 1, 0, 1 << 16, 1, 0], 3),
    ],
)
def test_the_latest_of_the_longest_occurrences_is_found(tokens: list[int], expected: int | None) -> None:
    assert following(tokens) == expected


def by_hand(tokens: list[int]) -> int | None:
    for length in (4, 3, 2):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return start + length
    return None


TRICKY = st.sampled_from([0, 1, 256, 65536, 1 << 24, 257])
"""Bytes of one look like bytes of others, shifted."""


@given(st.lists(TRICKY, max_size=40))
def test_as_by_hand(tokens: list[int]) -> None:
    assert following(tokens) == by_hand(tokens)


def test_what_is_long_ago_is_not_searched() -> None:
    tail = [7, 8, 9]
    assert following([*tail, *range(100, 100 + WINDOW - 10), *tail]) == 3
    assert following([*tail, *range(100, 100 + WINDOW), *tail]) is None


# --- proposing -----------------------------------------------------------------------------------------


def propose(tokens: list[int], most: int, rows: int = 1) -> list[int]:
    return Drafter(tokens).propose(tokens, most, rows)


def test_a_draft_is_what_followed() -> None:
    assert propose(REPETITIVE, 3) == [13, 14, 15]
    assert propose(list(range(50)), 3) == []


def test_a_loop_is_continued() -> None:
    assert propose([3, 4, 5, 4, 5], 3) == [4, 5, 4]
    assert propose([4, 4, 4], 3) == [4, 4, 4]


def test_the_text_may_grow_between_drafts() -> None:
    tokens = list(REPETITIVE)
    drafter = Drafter(tokens)
    assert drafter.propose(tokens, 2, batch_size=1) == [13, 14]
    tokens += [13, 14, 99, 16, 17]
    drafter.observe(tokens)
    assert drafter.propose(tokens, 2, batch_size=1) == [10, 11]


def test_a_text_is_followed_where_it_is_copied_from() -> None:
    """Not from the latest place with the same last tokens, which here goes on otherwise."""
    source = [10, 11, 12, 20, 11, 12, 30, 31]
    tokens = [*source, 40, 41, 10, 11]
    drafter = Drafter(tokens)
    tokens.append(12)
    drafter.observe(tokens)
    assert drafter.propose(tokens, 3, batch_size=1) == [20, 11, 12]


def test_the_chance_is_learned_without_drafts_too() -> None:
    tokens = [5, 6] * 4
    drafter = Drafter(tokens)
    lengths = []
    for token in [*range(100, 120), *[5, 6] * 6]:
        tokens.append(token)
        drafter.observe(tokens)
        lengths.append(len(drafter.propose(tokens, 8, batch_size=1)))
    assert lengths[:20] == [0] * 20
    assert drafter.value(batch_size=1) > WAIT_COST
    assert lengths[-1] > 4, "as soon as the guesses are right"


def test_wrong_guesses_end_the_drafts() -> None:
    """Each pair has been there before, and what follows is always another."""
    tokens = [5, 6, 7, 8]
    drafter, drafted = Drafter(tokens), 0
    for number in range(300):
        tokens += [5, 6]
        drafter.observe(tokens)
        drafted += len(drafter.propose(tokens, 8, batch_size=1))
        tokens += [100 + number]
        drafter.observe(tokens)
    assert 0 < drafted < 12
    assert drafter.value(batch_size=1) < WAIT_COST


def test_the_more_sequences_the_surer_a_draft_must_be() -> None:
    tokens = REPETITIVE * 3
    drafter = Drafter(REPETITIVE * 2)
    drafter.observe(tokens)
    lengths = [len(drafter.propose(tokens, 64, rows)) for rows in (1, 4, 16, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 10 > lengths[-1] >= 1
    assert price(1) < price(32) < 1
    assert not Drafter(tokens).propose(tokens, 64, batch_size=64), "not at first"


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
    ],
)
def test_what_depends_on_the_tokens_in_between_gets_no_draft(options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, **options)
    assert not can_draft(params)
    scheduler, _ = make_scheduler(speculate=4)
    scheduler.add(make_sequence(1, REPETITIVE, 9, params))
    for _ in range(2):
        step = scheduler.schedule()
        assert step is not None
        assert not step.scheduled[0].draft
        scheduler.apply(answer(step, [13]))


# --- planning ------------------------------------------------------------------------------------------


def make_scheduler(num_blocks: int = 64, **options: Any) -> tuple[Scheduler, BlockPool]:
    config = EngineConfig(**{"max_bs": 8, "max_num_batched_tokens": 32} | options)
    pool = BlockPool(num_blocks)
    return Scheduler(config, pool, BLOCK, [EOS]), pool


def make_sequence(
    seq_id: int, prompt: list[int], max_tokens: int, params: SamplingParams | None = None
) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        params=params or SamplingParams(temperature=0, seed=seq_id),
        max_total=len(prompt) + max_tokens,
        queue_key=(0, seq_id),
    )


def answer(step: Step, *tokens: list[int]) -> StepResult:
    rows = [row for row in step.scheduled if row.sample]
    return StepResult(step.step_id, [Sampled(row.seq_id, t) for row, t in zip(rows, tokens, strict=True)])


def play(scheduler: Scheduler, *tokens: list[int]) -> tuple[ScheduledSequence, ...]:
    step = scheduler.schedule()
    assert step is not None
    scheduler.apply(answer(step, *tokens))
    return tuple(step.scheduled)


def test_a_draft_is_planned_after_the_last_token_and_accepted_in_part() -> None:
    scheduler, _ = make_scheduler(speculate=3)
    scheduler.add(make_sequence(1, REPETITIVE, 20))
    play(scheduler, [13])
    (row,) = play(scheduler, [14, 15, 99])
    assert (row.start, row.count, row.sample, row.draft) == (11, 4, True, [14, 15, 16])
    assert row.new_block_ids, "positions 12 to 14 are in a further block"
    (row,) = play(scheduler, [7])
    assert (row.start, row.count, row.draft, row.new_block_ids) == (14, 1, [], [])
    statistics = scheduler.statistics()
    assert (statistics.draft_tokens, statistics.accepted_tokens) == (3, 2)


def test_blocks_of_a_refused_draft_are_told_once() -> None:
    scheduler, _ = make_scheduler(speculate=6)
    scheduler.add(make_sequence(1, REPETITIVE, 20))
    play(scheduler, [13])
    (drafted,) = play(scheduler, [99])
    assert len(drafted.new_block_ids) == 2
    assert [play(scheduler, [50 + i])[0].new_block_ids for i in range(8)] == [[]] * 8
    assert len(play(scheduler, [60])[0].new_block_ids) == 1


def test_nothing_follows_a_draft_before_its_result() -> None:
    scheduler, _ = make_scheduler(speculate=3)
    assert scheduler.steps_ahead == 1
    scheduler.add(make_sequence(1, REPETITIVE, 20))
    play(scheduler, [13])
    assert scheduler.steps_ahead == 0
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.schedule() is None
    scheduler.apply(answer(step, [14, 15, 16, 17]))
    assert scheduler.schedule() is not None


def test_steps_are_planned_ahead_while_drafts_do_not_pay() -> None:
    scheduler, _ = make_scheduler(speculate=3)
    scheduler.add(make_sequence(1, REPETITIVE, 60))
    steps = 0
    while scheduler.steps_ahead == 0 or steps == 0:
        play(scheduler, [20 + steps])
        steps += 1
    assert 2 < steps < 10
    play(scheduler, [12])
    for token in REPETITIVE[3:9]:
        ahead = play(scheduler, [token])
        assert not ahead[0].draft or scheduler.steps_ahead == 0
    assert scheduler.steps_ahead == 0, "the text repeats itself again"
    assert play(scheduler, [10])[0].draft


def test_a_prompt_in_chunks_is_planned_ahead() -> None:
    scheduler, _ = make_scheduler(speculate=3)
    scheduler.add(make_sequence(1, REPETITIVE * 8, 60))
    assert scheduler.schedule() is not None
    assert scheduler.steps_ahead == 1


def test_a_draft_ends_where_the_text_must() -> None:
    scheduler, _ = make_scheduler(speculate=8)
    scheduler.add(make_sequence(1, REPETITIVE, 4))
    play(scheduler, [13])
    (row,) = play(scheduler, [14, 15, 16])
    assert row.draft == [14, 15]
    assert scheduler.statistics().running == 0


def test_what_comes_after_the_end_is_dropped() -> None:
    scheduler, pool = make_scheduler(speculate=8)
    scheduler.add(make_sequence(1, [*REPETITIVE[:5], EOS, *REPETITIVE[5:]], 20))
    play(scheduler, [13])
    step = scheduler.schedule()
    assert step is not None
    assert step.scheduled[0].draft[:3] == [14, EOS, 15]
    (event,) = scheduler.apply(answer(step, [14, EOS, 15, 16]))
    assert (event.token_ids, event.finish_reason) == ([14, EOS], "stop")
    assert pool.statistics().used == 0
    pool.check_integrity()


def test_no_one_loses_blocks_or_budget_for_a_guess() -> None:
    scheduler, pool = make_scheduler(num_blocks=7, speculate=8, max_num_batched_tokens=24)
    scheduler.add(make_sequence(1, REPETITIVE, 9))
    scheduler.add(make_sequence(2, REPETITIVE, 9))
    play(scheduler, [13], [13])
    rows = play(scheduler, [99], [99])
    assert [len(row.draft) for row in rows] == [0, 0], "a block is left, and each may need one"
    assert sum(row.count for row in rows) <= 24
    pool.check_integrity()


def test_guesses_leave_half_of_the_budget() -> None:
    scheduler, _ = make_scheduler(speculate=8, max_num_batched_tokens=9, max_bs=3)
    scheduler.add(make_sequence(1, REPETITIVE, 40))
    play(scheduler)
    play(scheduler, [13])
    scheduler.add(make_sequence(2, list(range(100, 150)), 4))
    rows = play(scheduler, [99])
    assert [(row.count, len(row.draft)) for row in rows] == [(5, 4), (4, 0)]


def test_an_abort_while_a_draft_is_computed() -> None:
    scheduler, pool = make_scheduler(speculate=8)
    scheduler.add(make_sequence(1, REPETITIVE, 40))
    play(scheduler, [13])
    step = scheduler.schedule()
    assert step is not None
    assert step.scheduled[0].draft
    assert scheduler.abort(1)
    assert scheduler.apply(answer(step, [14, 15])) == []
    assert pool.statistics().used == 0


def test_a_sequence_preempted_while_its_draft_is_computed_goes_on() -> None:
    scheduler, pool = make_scheduler(num_blocks=10, speculate=2)
    scheduler.add(make_sequence(1, list(range(30, 45)), 20))
    scheduler.add(make_sequence(2, REPETITIVE, 20))
    play(scheduler, [50], [13])
    pending = scheduler.schedule()
    assert pending is not None
    assert [row.draft for row in pending.scheduled] == [[], [14, 15]]
    for token in range(60, 70):  # 1 goes ahead until it needs the blocks of 2
        if not scheduler.statistics().preemptions:
            play(scheduler, [token])
    assert scheduler.statistics().preemptions == 1
    (_, event) = scheduler.apply(answer(pending, [50], [14, 15, 99]))
    assert event.token_ids == [14, 15, 99]
    assert scheduler.abort(1)
    step = scheduler.schedule()
    assert step is not None
    assert step.new_sequences[0].token_ids == [*REPETITIVE, 13, 14, 15, 99]
    pool.check_integrity()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fewer_steps_and_the_same_text(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3)
    steps, texts = [], []
    for speculate in (0, 8):
        scheduler, _ = make_scheduler(speculate=speculate)
        runner = ScriptedRunner()
        runner.load(Start(EngineConfig(block_size=BLOCK), RankSpec(), "scripted:repeat=5"), lambda _: None)
        scheduler.add(make_sequence(1, [7, 8, 9], 120, params))
        tokens: list[int] = []
        count = 0
        while (step := scheduler.schedule()) is not None:
            for event in scheduler.apply(runner.submit(step).result()):
                tokens += event.token_ids
            count += 1
        steps.append(count)
        texts.append(tokens)
    assert texts[0] == texts[1] == scripted_tokens([7, 8, 9], params, 120, ScriptedSettings(repeat=5))
    assert steps[1] < 0.6 * steps[0]
    assert steps[1] == steps[0] - scheduler.statistics().accepted_tokens == scheduler.statistics().steps
