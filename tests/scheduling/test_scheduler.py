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
from ullm.testing import ScriptedRunner, ScriptedSettings, scripted_tokens

BLOCK = 4
EOS = 2


def make_scheduler(num_blocks: int = 64, **options: Any) -> tuple[Scheduler, BlockPool]:
    config = EngineConfig(**{"max_bs": 8, "max_num_batched_tokens": 16} | options)
    pool = BlockPool(num_blocks)
    return Scheduler(config, pool, BLOCK, [EOS], prefix_cache=config.prefix_cache), pool


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
) -> None:
    scheduler, pool = make_scheduler(
        num_blocks,
        max_bs=6,
        max_num_batched_tokens=budget,
        prefix_cache=prefix_cache,
        speculate=speculate,
    )
    model = f"scripted:num_blocks={num_blocks}" + (f",eos_after={eos_after}" if eos_after else "")
    model += f",repeat={repeat}" if repeat else ""
    runner = ScriptedRunner()
    runner.load(Start(EngineConfig(block_size=BLOCK), RankSpec(), model), lambda _: None)
    run(scheduler, pool, runner, plans, steps_ahead)
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
