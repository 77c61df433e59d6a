"""The scheduler, driven step by step and by random runs against a runner that checks every plan."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullm.config import EngineConfig
from ullm.protocol.messages import RankSpec, Sampled, Start, Step, StepResult
from ullm.sampling import SamplingParams
from ullm.scheduling.block_pool import BlockPool
from ullm.scheduling.scheduler import Scheduler
from ullm.scheduling.sequence import Sequence, TokenEvent
from ullm.scheduling.sequence_blocks import most_blocks
from ullm.testing import ScriptedRunner, ScriptedSettings, scripted_tokens

BLOCK = 4
EOS = 2


def make_scheduler(
    num_blocks: int = 64, stages: int = 1, window: int = 0, **options: Any
) -> tuple[Scheduler, BlockPool]:
    config = EngineConfig(**{"max_bs": 8, "max_num_batched_tokens": 16} | options)
    pool = BlockPool(num_blocks)
    cache = config.prefix_cache
    return Scheduler(config, pool, BLOCK, [EOS], prefix_cache=cache, stages=stages, window=window), pool


def make_sequence(seq_id: int, prompt: list[int], max_tokens: int = 4, **params: Any) -> Sequence:
    priority = int(params.pop("priority", 0))
    return Sequence(
        seq_id=seq_id,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        params=SamplingParams(temperature=0, max_tokens=max_tokens, seed=seq_id, **params),
        max_total=len(prompt) + max_tokens,
        queue_key=(priority, seq_id),
    )


def answer(step: Step, token: int = 7) -> StepResult:
    return StepResult(step.step_id, [Sampled(row.seq_id, [token]) for row in step.scheduled if row.sample])


def shape(step: Step | None) -> list[tuple[int, int, int, bool]]:
    assert step is not None
    return [(row.seq_id, row.start, row.count, row.sample) for row in step.scheduled]


def test_many_long_sequences_are_introduced_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no frame becomes too long; a single sequence may be as long as it likes."""
    monkeypatch.setattr("ullm.scheduling.scheduler.MAX_NEW_BYTES", 2500)
    scheduler, _ = make_scheduler(num_blocks=200, max_num_batched_tokens=600)
    for seq_id in (1, 2, 3):
        scheduler.add(make_sequence(seq_id, [5] * 100))  # 900 bytes of tokens at most, and the rest
    scheduler.add(make_sequence(4, [5] * 300))
    started = []
    while (step := scheduler.schedule()) is not None and len(started) < 4:
        started.append([new.seq_id for new in step.new_sequences])
        scheduler.apply(answer(step))
    assert [ids for ids in started if ids] == [[1], [2], [3], [4]]


# --- a model that sees a window -----------------------------------------------------------------------


def test_blocks_behind_the_window_are_given_back() -> None:
    """A text of any length has at most the blocks of a step and a window; those behind stay to be found."""
    most = most_blocks(10, 16, BLOCK)
    scheduler, pool = make_scheduler(num_blocks=most, window=10)
    scheduler.add(make_sequence(1, [5] * 200, max_tokens=100))
    used = []
    while (step := scheduler.schedule()) is not None:
        used.append(pool.statistics().used)
        scheduler.apply(answer(step))
    assert len(used) == 13 + 99  # nothing was computed twice
    assert max(used) <= most
    assert set(used[20:]) == {3, 4}  # ten keys lie in three or four blocks of four
    assert pool.statistics().used == 0


def test_a_prefix_whose_beginning_is_lost_is_found_if_what_it_sees_is_there() -> None:
    prompt = list(range(10, 90))
    scheduler, pool = make_scheduler(num_blocks=20, window=6)
    scheduler.add(make_sequence(1, prompt, max_tokens=1))
    while (step := scheduler.schedule()) is not None:
        scheduler.apply(answer(step))
    other = pool.allocate(14)  # takes the oldest: the blocks of the beginning
    scheduler.add(make_sequence(2, [*prompt, 5], max_tokens=1))
    step = scheduler.schedule()
    assert step is not None
    assert shape(step) == [(2, 80, 1, True)]
    assert step.new_sequences[0].num_cached_tokens == 80
    scheduler.apply(answer(step))
    pool.release(other)
    pool.check_integrity()


def test_a_prefix_of_which_the_window_lacks_a_block_is_computed_from_before_it() -> None:
    prompt = list(range(10, 50))
    scheduler, pool = make_scheduler(num_blocks=12, window=6)
    scheduler.add(make_sequence(1, prompt, max_tokens=1))
    while (step := scheduler.schedule()) is not None:
        scheduler.apply(answer(step))
    other = pool.allocate(12 - 1)  # all but the last that was given back
    scheduler.add(make_sequence(2, [*prompt, 5], max_tokens=1))
    assert scheduler.schedule() is None
    pool.release(other)
    step = scheduler.schedule()
    assert step is not None
    assert shape(step) == [(2, 0, 16, False)]


# --- by hand -----------------------------------------------------------------------------------------


def test_nothing_to_do_is_no_step() -> None:
    scheduler, _ = make_scheduler()
    assert scheduler.schedule() is None


def test_numbers_have_no_gaps() -> None:
    """A worker takes a step that is not the next one for a lost frame."""
    scheduler, _ = make_scheduler()
    assert scheduler.schedule() is None
    scheduler.add(make_sequence(1, [5, 6, 7]))
    first = scheduler.schedule()
    assert first is not None
    scheduler.abort(1)
    assert scheduler.schedule() is None
    scheduler.add(make_sequence(2, [5, 6, 7]))
    second = scheduler.schedule()
    assert second is not None
    assert (first.step_id, second.step_id) == (1, 2)


def test_a_long_prompt_goes_in_chunks_and_samples_at_its_end() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(1, list(range(10, 46))))
    assert shape(scheduler.schedule()) == [(1, 0, 16, False)]
    assert shape(scheduler.schedule()) == [(1, 16, 16, False)]
    assert shape(scheduler.schedule()) == [(1, 32, 4, True)]
    assert shape(scheduler.schedule()) == [(1, 36, 1, True)]


def test_decodes_go_before_the_rest_of_an_older_prompt() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(2, [5, 6]))
    first = scheduler.schedule()
    scheduler.add(make_sequence(1, list(range(10, 60))))
    assert first is not None
    scheduler.apply(answer(first))
    assert shape(scheduler.schedule()) == [(2, 2, 1, True), (1, 0, 15, False)]


def test_a_step_is_planned_before_the_result_of_the_one_before() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(1, [5, 6, 7], max_tokens=3))
    steps = [scheduler.schedule() for _ in range(3)]
    assert [shape(step) for step in steps] == [[(1, 0, 3, True)], [(1, 3, 1, True)], [(1, 4, 1, True)]]
    assert scheduler.schedule() is None, "the three pending tokens are all it may have"


def test_tokens_travel_once_and_blocks_as_they_are_added() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(1, [5, 6, 7], max_tokens=6))
    first, second, third = (scheduler.schedule() for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.new_sequences[0].token_ids == [5, 6, 7]
    assert (len(first.scheduled[0].new_block_ids), len(second.scheduled[0].new_block_ids)) == (1, 0)
    assert len(third.scheduled[0].new_block_ids) == 1
    assert second.new_sequences == third.new_sequences == []


def test_an_end_token_finishes_and_frees() -> None:
    scheduler, pool = make_scheduler()
    scheduler.add(make_sequence(1, [5, 6], max_tokens=9))
    step = scheduler.schedule()
    assert step is not None
    (event,) = scheduler.apply(answer(step, EOS))
    assert event == TokenEvent(seq_id=1, index=0, token_ids=[EOS], finish_reason="stop")
    assert pool.statistics().used == 0
    assert scheduler.schedule() is None


def test_a_stop_token_is_named_as_the_reason() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(1, [5], max_tokens=9, stop_token_ids=(7,)))
    step = scheduler.schedule()
    assert step is not None
    (event,) = scheduler.apply(answer(step, 7))
    assert (event.finish_reason, event.stop_reason) == ("stop", 7)


@pytest.mark.parametrize(
    ("params", "reason"), [({"ignore_eos": True}, None), ({"min_tokens": 2}, None), ({}, "stop")]
)
def test_an_end_token_may_be_ignored(params: dict[str, object], reason: str | None) -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(1, [5], max_tokens=9, **params))
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.apply(answer(step, EOS))[0].finish_reason == reason


def test_max_tokens_does_not_count_the_prompt() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(1, [5] * 10, max_tokens=2))
    reasons = []
    while (step := scheduler.schedule()) is not None:
        reasons += [event.finish_reason for event in scheduler.apply(answer(step))]
    assert reasons == [None, "length"]


def test_tokens_of_an_aborted_sequence_are_dropped() -> None:
    scheduler, pool = make_scheduler()
    scheduler.add(make_sequence(1, [5, 6]))
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    assert scheduler.apply(answer(step)) == []
    assert pool.statistics().used == 0


def test_workers_are_told_to_forget_what_ended() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(1, [5, 6]))
    scheduler.schedule()
    scheduler.abort(1)
    scheduler.add(make_sequence(2, [5, 6]))
    step = scheduler.schedule()
    assert step is not None
    assert step.released == [1]


def test_at_most_max_bs_run() -> None:
    scheduler, _ = make_scheduler(max_bs=2)
    for seq_id in (1, 2, 3):
        scheduler.add(make_sequence(seq_id, [5]))
    assert [row[0] for row in shape(scheduler.schedule())] == [1, 2]
    assert (scheduler.statistics().running, scheduler.statistics().waiting) == (2, 1)


def test_priority_goes_before_arrival() -> None:
    scheduler, _ = make_scheduler(max_bs=1)
    scheduler.add(make_sequence(1, [5], priority=1))
    scheduler.add(make_sequence(2, [5], priority=0))
    assert [row[0] for row in shape(scheduler.schedule())] == [2]


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler, _ = make_scheduler()
    prompt = list(range(10, 20))
    scheduler.add(make_sequence(1, prompt))
    scheduler.schedule()
    scheduler.add(make_sequence(2, [*prompt, 99]))
    step = scheduler.schedule()
    assert step is not None
    assert (2, 8, 3, True) in shape(step)
    assert step.new_sequences[0].num_cached_tokens == 8
    assert len(step.new_sequences[0].block_ids) == 2
    assert scheduler.statistics().prefix_hits == 8


def test_the_last_position_is_computed_even_if_all_is_cached() -> None:
    scheduler, _ = make_scheduler()
    prompt = list(range(10, 18))
    for seq_id in (1, 2):
        scheduler.add(make_sequence(seq_id, prompt))
        step = scheduler.schedule()
    assert (2, 4, 4, True) in shape(step)


def test_prompt_logprobs_need_every_position() -> None:
    scheduler, _ = make_scheduler()
    prompt = list(range(10, 18))
    scheduler.add(make_sequence(1, prompt))
    scheduler.schedule()
    scheduler.add(make_sequence(2, prompt, prompt_logprobs=1))
    assert (2, 0, 8, True) in shape(scheduler.schedule())


def test_without_the_prefix_cache_nothing_is_found() -> None:
    scheduler, _ = make_scheduler(prefix_cache=False)
    for seq_id in (1, 2):
        scheduler.add(make_sequence(seq_id, list(range(10, 18))))
        step = scheduler.schedule()
    assert (2, 0, 8, True) in shape(step)


def test_the_last_to_run_gives_up_its_blocks() -> None:
    scheduler, pool = make_scheduler(num_blocks=4, prefix_cache=False)
    scheduler.add(make_sequence(1, [5] * 7, max_tokens=9))
    scheduler.add(make_sequence(2, [6] * 7, max_tokens=9))
    for _ in range(2):
        step = scheduler.schedule()
        assert step is not None
        scheduler.apply(answer(step))
    step = scheduler.schedule()
    assert step is not None
    assert shape(step) == [(1, 8, 1, True)]
    assert step.released == [2]
    assert scheduler.statistics().preemptions == 1
    pool.check_integrity()


def test_a_preempted_sequence_waits_for_its_pending_token() -> None:
    scheduler, _ = make_scheduler(num_blocks=4, prefix_cache=False)
    scheduler.add(make_sequence(1, [5] * 7, max_tokens=2))
    scheduler.add(make_sequence(2, [6] * 7, max_tokens=9))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert first is not None
    assert second is not None
    scheduler.apply(answer(first))
    third = scheduler.schedule()  # 1 needs nothing more; 2 needs a third block
    assert third is None or 2 in [row.seq_id for row in third.scheduled]
    scheduler.apply(answer(second))
    resumed = scheduler.schedule()
    assert resumed is not None
    assert {row.seq_id for row in resumed.scheduled} == {2}


def test_stages_compute_different_sequences_at_the_same_time() -> None:
    scheduler, _ = make_scheduler(stages=2)
    assert scheduler.steps_ahead == 1
    for seq_id in range(4):
        scheduler.add(make_sequence(seq_id, [5, 6], max_tokens=20))
    first = scheduler.schedule()
    assert first is not None
    assert scheduler.schedule() is None, "all of them are on their way"
    scheduler.apply(answer(first))
    turns: deque[Step] = deque()
    for _ in range(2):
        step = scheduler.schedule()
        assert step is not None
        turns.append(step)
    seen = []
    for _ in range(4):
        step = turns.popleft()
        seen.append({row.seq_id for row in step.scheduled})
        scheduler.apply(answer(step))
        following = scheduler.schedule()
        assert following is not None
        turns.append(following)
    assert seen == [{0, 1}, {2, 3}, {0, 1}, {2, 3}]


def test_one_sequence_alone_is_planned_ahead_through_all_stages() -> None:
    scheduler, _ = make_scheduler(stages=3)
    assert scheduler.steps_ahead == 2
    scheduler.add(make_sequence(1, [5, 6, 7]))
    steps = [scheduler.schedule() for _ in range(3)]
    assert [shape(step) for step in steps] == [[(1, 0, 3, True)], [(1, 3, 1, True)], [(1, 4, 1, True)]]


def test_drafts_leave_no_step_for_further_stages() -> None:
    scheduler, _ = make_scheduler(stages=3, speculate=4)
    assert scheduler.steps_ahead == 1


# --- against a runner that checks ----------------------------------------------------------------------


@dataclass
class Plan:
    """One request of a random run."""

    prompt: list[int]
    max_tokens: int
    arrives: int
    aborted: int | None
    priority: int
    output: list[int] = field(default_factory=list)
    reason: str | None = None


def plans() -> st.SearchStrategy[list[Plan]]:
    shared = list(range(100, 124))
    prompt = st.builds(
        lambda prefix, tail: shared[:prefix] + tail,
        st.integers(0, 24),
        st.lists(st.integers(3, 99), min_size=1, max_size=12),
    )
    one = st.builds(
        Plan,
        prompt=prompt,
        max_tokens=st.integers(1, 20),
        arrives=st.integers(0, 10),
        aborted=st.one_of(st.none(), st.none(), st.integers(0, 20)),
        priority=st.integers(0, 2),
    )
    return st.lists(one, min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    plans=plans(),
    num_blocks=st.integers(14, 40),
    budget=st.integers(6, 40),
    steps_ahead=st.integers(0, 1),
    prefix_cache=st.booleans(),
    eos_after=st.one_of(st.none(), st.integers(1, 10)),
    speculate=st.integers(0, 6),
    repeat=st.one_of(st.none(), st.integers(1, 7)),
    stages=st.sampled_from([1, 1, 2, 3]),
    window=st.sampled_from([0, 0, 1, 3, 4, 5, 9, 16]),
    is_tight=st.booleans(),
)
def test_every_plan_can_be_followed_and_every_text_is_right(
    plans: list[Plan],
    num_blocks: int,
    budget: int,
    steps_ahead: int,
    prefix_cache: bool,
    eos_after: int | None,
    speculate: int,
    repeat: int | None,
    stages: int,
    window: int,
    is_tight: bool,
) -> None:
    if window and is_tight:  # as little as one sequence needs, however long
        num_blocks = most_blocks(window, budget, BLOCK)
    scheduler, pool = make_scheduler(
        num_blocks,
        max_bs=6,
        max_num_batched_tokens=budget,
        prefix_cache=prefix_cache,
        speculate=speculate,
        stages=stages,
        window=window,
    )
    model = f"scripted:num_blocks={num_blocks}" + (f",eos_after={eos_after}" if eos_after else "")
    model += f",window={window}" + (f",repeat={repeat}" if repeat else "")
    runner = ScriptedRunner()
    runner.load(Start(EngineConfig(block_size=BLOCK), RankSpec(), model), lambda _: None)
    run(scheduler, pool, runner, plans, steps_ahead if stages == 1 else stages - 1)
    script = ScriptedSettings(eos_after=eos_after, repeat=repeat)
    for seq_id, plan in enumerate(plans):
        params = SamplingParams(temperature=0, seed=seq_id)
        expected = scripted_tokens(plan.prompt, params, plan.max_tokens, script)
        if plan.reason == "aborted":
            assert plan.output == expected[: len(plan.output)]
        else:
            assert plan.output == expected
            assert plan.reason == ("stop" if expected[-1] == script.eos_token_id else "length")
    assert pool.statistics().used == 0


def run(scheduler: Scheduler, pool: BlockPool, runner: ScriptedRunner, plans: list[Plan], ahead: int) -> None:
    """Play the plans; as many steps are pending as a real loop would have."""
    pending: deque[StepResult] = deque()
    for tick in range(3000):
        for seq_id, plan in enumerate(plans):
            if plan.arrives == tick:
                scheduler.add(make_sequence(seq_id, plan.prompt, plan.max_tokens, priority=plan.priority))
            if plan.aborted is not None and plan.arrives + plan.aborted == tick and scheduler.abort(seq_id):
                plan.reason = "aborted"
        if len(pending) <= ahead and (step := scheduler.schedule()) is not None:
            pending.append(runner.submit(step).result())
        if len(pending) > ahead or (pending and step is None):
            for event in scheduler.apply(pending.popleft()):
                assert event.index == len(plans[event.seq_id].output)
                plans[event.seq_id].output += event.token_ids
                plans[event.seq_id].reason = event.finish_reason
        pool.check_integrity()
        if not pending and all(plan.reason for plan in plans):
            return
    pytest.fail("not all sequences ended")


def test_a_scheduler_step_at_256_running_sequences_is_planned_and_applied() -> None:
    scheduler, pool = make_scheduler(4096, max_bs=256, max_num_batched_tokens=512)
    for seq_id in range(256):
        scheduler.add(make_sequence(seq_id, [seq_id, 5, 6], max_tokens=8))
    while (step := scheduler.schedule()) is not None:
        scheduler.apply(answer(step))
    assert scheduler.statistics().running == 0
    pool.check_integrity()
