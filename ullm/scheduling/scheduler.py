"""The scheduler: which sequences compute what in the next step. Pure, and on one screen.

Each step has a budget of tokens. Running sequences come first: those that need one token, then those
with a longer stretch of prompt to go, in chunks; what is left of the budget admits waiting ones. When
the blocks run out, the sequence that should run last gives up its blocks and is computed again later
(preemption by recompute).

`Scheduler.schedule` may be called before the results of the previous step are applied: a sequence then
counts its sampled tokens as pending, and the worker fills in their values. A step may also compute drafted
tokens (`ullm.scheduling.drafting`); until they are verified, no further step includes their sequence.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter

from ullm.config import SchedulerConfig
from ullm.protocol.messages import NewSequence, Sampled, ScheduledSequence, Step, StepResult
from ullm.scheduling.block_pool import BlockPool
from ullm.scheduling.sequence import FINISHED, RUNNING, WAITING, Sequence, TokenEvent
from ullm.scheduling.sequence_blocks import SequenceBlocks, Window, most_blocks
from ullm.scheduling.speculation import Speculation
from ullm.scheduling.statistics import SchedulerStatistics

MAX_NEW_BYTES = 4 << 20
"""Upper bound of the bytes of all sequences that are new in one step; a single one may have more. It keeps
frames far below their limit, and the planning and encoding of a step short, when many long sequences start
or resume at once."""

_queue_key = attrgetter("queue_key")


class Scheduler:
    """Plans steps over one worker group's KV blocks.

    Args:
        config: batch size, token budget, drafted tokens.
        pool: the group's KV blocks.
        block_size: tokens per block.
        eos_token_ids: tokens that end a sequence.
        prefix_cache: whether blocks of equal prefixes are shared.
        last_step: number of the step before the first one planned here.
        stages: pipeline stages, which compute different sequences at the same time.
        window: keys that a query sees, where no layer sees all; 0: at least one does.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        block_size: int,
        eos_token_ids: Iterable[int],
        *,
        prefix_cache: bool = True,
        last_step: int = 0,
        stages: int = 1,
        window: int = 0,
    ) -> None:
        self._config = config
        # A step with drafts waits for the one before, so there is nothing to keep further stages busy with.
        self._micro_batches = stages if config.steps_ahead and not config.speculate else 1
        most = most_blocks(window, config.max_num_batched_tokens, block_size)
        seen = Window(window, most) if window else None
        self._blocks = SequenceBlocks(pool, block_size, prefix_cache=prefix_cache, window=seen)
        self._eos = frozenset(eos_token_ids)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[tuple[tuple[int, ...], Sequence]] = []
        self._running: list[Sequence] = []
        self._released: list[int] = []
        self._steps = last_step
        self._preemptions = 0
        self._speculation = Speculation(config.speculate)

    # --- requests and results ----------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits the context and the pool."""
        self._speculation.begin(sequence)
        sequence.set_stop_token_ids(self._eos)
        self._sequences[sequence.seq_id] = sequence
        heapq.heappush(self._waiting, (sequence.queue_key, sequence))

    def abort(self, seq_id: int) -> bool:
        """Drop a sequence and free its blocks; return False if it is not here (any more)."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            self._finish(sequence)
        return sequence is not None

    def apply(self, result: StepResult) -> list[TokenEvent]:
        """Append the tokens that a step sampled; drop those of sequences that are gone."""
        return [event for sampled in result.sampled if (event := self._apply(sampled)) is not None]

    def _apply(self, sampled: Sampled) -> TokenEvent | None:
        sequence = self._sequences.get(sampled.seq_id)
        if sequence is None:
            return None
        token_ids, logprobs, reason = sampled.token_ids, sampled.logprobs, None
        sequence.num_pending -= 1 if token_ids else 0
        index = sequence.num_output_tokens
        if sampled.error:
            self._finish(sequence)
            lacks = sampled.lacks_adapter
            return TokenEvent(sequence.seq_id, index, [], error=sampled.error, lacks_adapter=lacks)
        for count, token_id in enumerate(token_ids, 1):
            sequence.append(token_id)
            if reason := sequence.finish_reason(token_id):
                token_ids, logprobs = token_ids[:count], logprobs and logprobs[:count]
                break
        self._speculation.observe(sequence, len(sampled.token_ids))
        if len(token_ids) > 1:
            self._blocks.publish(sequence)
        if reason:
            self._finish(sequence)
        stop = token_ids[-1] if reason == "stop" and token_ids[-1] not in self._eos else None
        scores, cached = sampled.prompt_logprobs, sequence.num_cached_tokens
        pooled = sampled.embedding
        return TokenEvent(
            sequence.seq_id, index, token_ids, logprobs, scores, reason, stop, cached, embedding=pooled
        )

    # --- planning ------------------------------------------------------------------------------------

    @property
    def steps_ahead(self) -> int:
        """Steps without a result beside which another one may be planned.

        0 while drafts gain more than planning ahead, since a draft needs the token before it. With pipeline
        stages, there is a step for each of them.
        """
        if self._speculation.is_worth_waiting(self._running):
            return 0
        return max(self._config.steps_ahead, self._micro_batches - 1)

    def schedule(self) -> Step | None:
        """Plan the next step; return None if there is nothing to compute now."""
        self._steps += 1
        scheduled: list[ScheduledSequence] = []
        budget = self._continue_running(scheduled, self._config.max_num_batched_tokens)
        new = self._admit_waiting(scheduled, budget)
        if not scheduled:
            self._steps -= 1  # workers accept no gap in the numbers
            return None
        publish, sequences = self._blocks.publish, self._sequences
        for entry in scheduled:
            publish(sequences[entry.seq_id])
        released, self._released = self._released, []
        return Step(step_id=self._steps, scheduled=scheduled, new_sequences=new, released=released)

    def _continue_running(self, scheduled: list[ScheduledSequence], budget: int) -> int:
        # Drafts take at most half of what the running sequences themselves leave.
        spare = (budget - len(self._running)) // 2 if self._config.speculate else 0
        extend = self._blocks.extend
        for sequence, needed in self._in_turn():
            count = min(needed, budget)
            if count <= 0 or sequence.status is not RUNNING:  # the budget is spent, or it was preempted
                continue
            if extend(sequence, count) or self._preempt_for(sequence, count):
                draft = self._draft(sequence, spare) if spare > 0 else []
                scheduled.append(self._plan(sequence, count, draft))
                budget -= count + len(draft)
                spare -= len(draft)
        return budget

    def _in_turn(self) -> list[tuple[Sequence, int]]:
        """Return the running sequences, each with the number of positions that it could compute."""
        needs = [(s, needed) for s in self._running if (needed := s.num_to_compute) > 0]
        if self._micro_batches > 1 and len(self._running) > 1:
            needs = self._micro_batch(needs)
        # Decodes before prefill chunks, so that a long prompt does not hold up others' next tokens.
        prefills = [need for need in needs if need[1] > 1]
        return [need for need in needs if need[1] == 1] + prefills if prefills else needs

    def _micro_batch(self, needs: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Leave decodes to the steps that other stages compute meanwhile: those that are on their way, and
        more than an equal share. Those that have waited longest come first."""
        share = -(-len(self._running) // self._micro_batches)
        decodes = [need for need in needs if need[1] == 1 and not need[0].num_pending]
        decodes.sort(key=lambda need: need[0].last_planned)
        return decodes[:share] + [need for need in needs if need[1] > 1]

    def _admit_waiting(self, scheduled: list[ScheduledSequence], budget: int) -> list[NewSequence]:
        new: list[NewSequence] = []
        room = MAX_NEW_BYTES
        while self._waiting and budget > 0 and len(self._running) < self._config.max_bs:
            sequence = self._waiting[0][1]
            if sequence.status is FINISHED:
                heapq.heappop(self._waiting)
                continue
            # A preempted sequence waits for the token that was being sampled when it lost its blocks.
            size = sequence.frame_bytes
            if sequence.num_pending or (new and size > room) or not self._blocks.admit(sequence):
                break
            room -= size
            heapq.heappop(self._waiting)
            insort(self._running, sequence, key=_queue_key)
            sequence.status = RUNNING
            count = min(sequence.num_to_compute, budget)
            self._blocks.extend(sequence, count)  # `admit` has checked that it fits
            entry = self._plan(sequence, count, [])
            scheduled.append(entry)
            new.append(
                introduction(
                    sequence,
                    sequence.token_ids,
                    block_ids=sequence.block_ids[: len(sequence.block_ids) - len(entry.new_block_ids)],
                    num_cached_tokens=entry.start,
                )
            )
            budget -= count
        return new

    def _draft(self, sequence: Sequence, limit: int) -> list[int]:
        """Draft up to ``limit`` tokens after the last one, and allocate blocks for them."""
        # No others lose blocks for a draft, neither now nor for their next token.
        room = self._blocks.room(sequence, len(self._running))
        draft = self._speculation.propose(sequence, min(limit, room), len(self._running))
        if draft:
            self._blocks.extend(sequence, 1 + len(draft))
        return draft

    def _plan(self, sequence: Sequence, count: int, draft: list[int]) -> ScheduledSequence:
        """Plan the next ``count`` positions and ``draft``, whose blocks are allocated."""
        start = sequence.num_computed
        sequence.last_planned = self._steps
        new_blocks = sequence.block_ids[sequence.num_sent_blocks :]
        sequence.num_sent_blocks = len(sequence.block_ids)
        sequence.num_computed += count
        sample = sequence.num_computed == len(sequence.token_ids) + sequence.num_pending
        sequence.num_pending += sample
        sequence.num_drafted = len(draft)
        return ScheduledSequence(sequence.seq_id, start, count + len(draft), sample, new_blocks, draft)

    # --- preemption and the end --------------------------------------------------------------------

    def _preempt_for(self, sequence: Sequence, count: int) -> bool:
        """Preempt sequences until ``count`` more positions of this one have blocks.

        Return False if the sequence itself was the last to run, and has lost its blocks.
        """
        while True:
            # A sequence that this step computes already cannot lose its blocks to another one in it.
            idle = (running for running in self._running if running.last_planned != self._steps)
            victim = max(idle, key=_queue_key)
            self._preempt(victim)
            if victim is sequence:
                return False
            if self._blocks.extend(sequence, count):
                return True

    def _preempt(self, sequence: Sequence) -> None:
        self._preemptions += 1
        self._leave(sequence)
        heapq.heappush(self._waiting, (sequence.queue_key, sequence))

    def _leave(self, sequence: Sequence) -> None:
        place = bisect_left(self._running, sequence.queue_key, key=_queue_key)
        del self._running[self._running.index(sequence, place)]
        sequence.status = WAITING
        self._released.append(sequence.seq_id)
        self._blocks.release(sequence)

    def _finish(self, sequence: Sequence) -> None:
        del self._sequences[sequence.seq_id]
        if sequence.status is RUNNING:
            self._leave(sequence)
        sequence.status = FINISHED

    def statistics(self) -> SchedulerStatistics:
        """Return what is in the scheduler as a frozen value."""
        blocks = self._blocks.pool.statistics()
        return SchedulerStatistics(
            running=len(self._running),
            waiting=len(self._sequences) - len(self._running),
            blocks_total=blocks.total,
            blocks_used=blocks.used,
            prefix_queries=self._blocks.queries,
            prefix_hits=self._blocks.hits,
            preemptions=self._preemptions,
            draft_tokens=self._speculation.drafted,
            accepted_tokens=self._speculation.accepted,
            steps=self._steps,
        )


def introduction(
    sequence: Sequence,
    token_ids: Iterable[int] = (),
    *,
    block_ids: Iterable[int] = (),
    num_cached_tokens: int = 0,
) -> NewSequence:
    """Return what describes a sequence to the worker.

    Args:
        token_ids: its tokens.
        block_ids: its blocks so far; those for the step come with its entry in the step.
    """
    return NewSequence(
        seq_id=sequence.seq_id,
        token_ids=list(token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        params=sequence.params,
        block_ids=list(block_ids),
        num_cached_tokens=num_cached_tokens,
        grammar=sequence.grammar,
        adapter=sequence.adapter,
    )
