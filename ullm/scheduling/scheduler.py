"""The scheduler: which sequences compute what in the next step. Pure, and on one screen.

Each step has a budget of tokens. Running sequences come first: those that need one token, then those
with a longer stretch of prompt to go, in chunks; what is left of the budget admits waiting ones. When
the blocks run out, the sequence that should run last gives up its blocks and is computed again later
(preemption by recompute).

`Scheduler.schedule` may be called before the results of the step before are applied: a sequence then
counts its sampled tokens as pending, and the worker fills in their values. A row may guess the tokens
after a known one (`ullm.scheduling.drafting`); until the guesses are verified its sequence is left out.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter

from ullm.config import SchedulerConfig
from ullm.protocol.messages import NewSequence, Sampled, ScheduledSequence, Step, StepResult
from ullm.scheduling.block_pool import ROOT_HASH, BlockPool, block_hash
from ullm.scheduling.sequence import Sequence, TokenEvent
from ullm.scheduling.speculation import Speculation
from ullm.scheduling.statistics import SchedulerStatistics

_by_order = attrgetter("order")


class Scheduler:
    """Plans steps over one worker group's KV blocks.

    Args:
        config: batch size, token budget.
        pool: the group's KV blocks.
        block_size: tokens per block.
        eos_token_ids: tokens that end a sequence.
        prefix_cache: whether blocks of equal prefixes are shared.
        last_step: steps are numbered from the one after this.
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
    ) -> None:
        self._config = config
        self._pool = pool
        self._block_size = block_size
        self._eos = frozenset(eos_token_ids)
        self._prefix_cache = prefix_cache
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._running: list[Sequence] = []
        self._forget: list[int] = []
        self._steps = last_step
        self._queries = self._hits = self._preemptions = 0
        self._speculation = Speculation(config.speculate)

    # --- what comes in ---------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits the context and the pool."""
        self._speculation.begin(sequence)
        sequence.know_endings(self._eos)
        self._sequences[sequence.seq_id] = sequence
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def abort(self, seq_id: int) -> bool:
        """Drop a sequence and free its blocks; False if it is not here (any more)."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            self._finish(sequence)
        return sequence is not None

    def apply(self, result: StepResult) -> list[TokenEvent]:
        """Take in what a step sampled; tokens of sequences that are gone are dropped."""
        return [event for sampled in result.sampled if (event := self._apply(sampled)) is not None]

    def _apply(self, sampled: Sampled) -> TokenEvent | None:
        sequence = self._sequences.get(sampled.seq_id)
        if sequence is None:
            return None
        token_ids, logprobs, reason = sampled.token_ids, sampled.logprobs, None
        sequence.num_pending -= 1 if token_ids else 0
        index = sequence.num_output_tokens
        for count, token_id in enumerate(token_ids, 1):
            sequence.token_ids.append(token_id)
            if reason := sequence.finish_reason(token_id):
                token_ids, logprobs = token_ids[:count], logprobs and logprobs[:count]
                break
        self._speculation.observe(sequence, len(sampled.token_ids))
        if len(token_ids) > 1:
            self._publish(sequence)
        if reason:
            self._finish(sequence)
        stop = token_ids[-1] if reason == "stop" and token_ids[-1] not in self._eos else None
        scores, cached = sampled.prompt_logprobs, sequence.num_cached_tokens
        return TokenEvent(sequence.seq_id, index, token_ids, logprobs, scores, reason, stop, cached)

    # --- what goes out ---------------------------------------------------------------------------

    @property
    def steps_ahead(self) -> int:
        """Steps without a result beside which another one may be planned.

        None while drafts gain more than that, since a draft needs the token before it.
        """
        return 0 if self._speculation.is_worth_waiting(self._running) else self._config.steps_ahead

    def schedule(self) -> Step | None:
        """Plan the next step; None if there is nothing to compute now."""
        self._steps += 1
        rows: list[ScheduledSequence] = []
        budget = self._continue_running(rows, self._config.max_num_batched_tokens)
        new = self._admit_waiting(rows, budget)
        if not rows:
            self._steps -= 1  # the number is free: workers take no step that is out of turn
            return None
        for row in rows:
            self._publish(self._sequences[row.seq_id])
        released, self._forget = self._forget, []
        return Step(step_id=self._steps, scheduled=rows, new_sequences=new, released=released)

    def _continue_running(self, rows: list[ScheduledSequence], budget: int) -> int:
        # Guesses take at most half of what the running sequences themselves leave.
        spare = (budget - len(self._running)) // 2 if self._config.speculate else 0
        for sequence, needed in self._in_turn():
            count = min(needed, budget)
            if count > 0 and sequence.running and self._make_room(sequence, count):
                draft = self._draft(sequence, spare) if spare > 0 else []
                rows.append(self._plan(sequence, count, draft))
                budget -= count + len(draft)
                spare -= len(draft)
        return budget

    def _in_turn(self) -> list[tuple[Sequence, int]]:
        """Running sequences, and how many positions each could compute."""
        needs = [(s, needed) for s in self._running if (needed := s.num_to_compute) > 0]
        # Decodes before prefill chunks, so that a long prompt does not hold up others' next tokens.
        prefills = [need for need in needs if need[1] > 1]
        return [need for need in needs if need[1] == 1] + prefills if prefills else needs

    def _admit_waiting(self, rows: list[ScheduledSequence], budget: int) -> list[NewSequence]:
        new: list[NewSequence] = []
        while self._waiting and budget > 0 and len(self._running) < self._config.max_bs:
            sequence = self._waiting[0][1]
            if sequence.finished:
                heapq.heappop(self._waiting)
                continue
            # A preempted sequence waits for the token that was being sampled when it lost its blocks.
            if sequence.num_pending or not self._reserve(sequence):
                break
            heapq.heappop(self._waiting)
            insort(self._running, sequence, key=_by_order)
            sequence.running = True
            count = min(sequence.num_to_compute, budget)
            self._make_room(sequence, count)
            row = self._plan(sequence, count, [])
            rows.append(row)
            new.append(_introduce(sequence, row))
            budget -= count
        return new

    def _draft(self, sequence: Sequence, most: int) -> list[int]:
        """Guesses of what follows the last token, with blocks for them."""
        # No others lose blocks for a guess, neither now nor for their next token.
        blocks = len(sequence.block_ids) + max(0, self._pool.num_free - len(self._running))
        room = blocks * self._block_size - len(sequence.token_ids)
        draft = self._speculation.propose(sequence, min(most, room), len(self._running))
        if draft:
            self._make_room(sequence, 1 + len(draft))
        return draft

    def _plan(self, sequence: Sequence, count: int, draft: list[int]) -> ScheduledSequence:
        """The row for the next ``count`` positions, and ``draft``, whose blocks are there already."""
        start = sequence.num_computed
        sequence.planned_in = self._steps
        new_blocks = sequence.block_ids[sequence.num_sent_blocks :]
        sequence.num_sent_blocks = len(sequence.block_ids)
        sequence.num_computed += count
        sample = sequence.num_computed == len(sequence.token_ids) + sequence.num_pending
        sequence.num_pending += sample
        sequence.num_drafted = len(draft)
        return ScheduledSequence(sequence.seq_id, start, count + len(draft), sample, new_blocks, draft)

    # --- blocks ----------------------------------------------------------------------------------

    def _reserve(self, sequence: Sequence) -> bool:
        """Take the cached prefix of a waiting sequence, if the rest of it would fit as well.

        Asking for the whole sequence, not only for its first chunk, keeps long prompts from
        starting where they would be preempted half way.
        """
        cached = self._cached_prefix(sequence)
        needed = self._blocks_for(len(sequence.token_ids) + 1) - len(cached)
        if self._pool.num_free_after_taking(cached) < needed:
            return False
        self._pool.take(cached)
        sequence.block_ids = cached
        sequence.num_published = sequence.num_sent_blocks = len(cached)
        sequence.num_computed = len(cached) * self._block_size
        if not sequence.num_output_tokens:
            sequence.num_cached_tokens = sequence.num_computed
        self._queries += len(sequence.token_ids)
        self._hits += sequence.num_computed
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        if not self._prefix_cache or sequence.params.prompt_logprobs is not None:
            return []  # logits of the whole prompt are wanted, so all of it must be computed
        # At least one position must be computed, or there are no logits to sample from.
        full = (len(sequence.token_ids) - 1) // self._block_size
        self._extend_hashes(sequence, full)
        return self._pool.find(sequence.block_hashes[:full])

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Give ``sequence`` the blocks for ``count`` more positions; preempt others if need be."""
        missing = self._blocks_for(sequence.num_computed + count) - len(sequence.block_ids)
        if missing <= 0:
            return True
        while missing > self._pool.num_free:
            # A sequence that this step already computes cannot lose its blocks to another row of it.
            idle = (running for running in self._running if running.planned_in != self._steps)
            victim = max(idle, key=lambda running: running.order)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_ids += self._pool.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._preemptions += 1
        self._leave(sequence)
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _leave(self, sequence: Sequence) -> None:
        place = bisect_left(self._running, sequence.order, key=_by_order)
        del self._running[self._running.index(sequence, place)]
        sequence.running = False
        self._forget.append(sequence.seq_id)
        self._pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = sequence.num_published = sequence.num_sent_blocks = 0

    def _publish(self, sequence: Sequence) -> None:
        """Offer the blocks that planned steps fill to the prefix cache; none with a guess in them.

        Steps run in order, so whoever finds a block in a later step reads what is written by then.
        """
        if not self._prefix_cache or not sequence.running:
            return
        full = min(sequence.num_computed, len(sequence.token_ids)) // self._block_size
        if full == sequence.num_published:
            return
        self._extend_hashes(sequence, full)
        for position in range(sequence.num_published, full):
            self._pool.publish(sequence.block_ids[position], sequence.block_hashes[position])
        sequence.num_published = full

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        hashes, size = sequence.block_hashes, self._block_size
        for position in range(len(hashes), count):
            parent = hashes[-1] if hashes else ROOT_HASH
            hashes.append(block_hash(parent, sequence.token_ids[position * size : (position + 1) * size]))

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        del self._sequences[sequence.seq_id]
        if sequence.running:
            self._leave(sequence)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    # --- what is inside --------------------------------------------------------------------------

    def statistics(self) -> SchedulerStatistics:
        """What is in the scheduler, as a frozen value."""
        blocks = self._pool.statistics()
        return SchedulerStatistics(
            running=len(self._running),
            waiting=len(self._sequences) - len(self._running),
            blocks_total=blocks.total,
            blocks_used=blocks.used,
            prefix_queries=self._queries,
            prefix_hits=self._hits,
            preemptions=self._preemptions,
            draft_tokens=self._speculation.drafted,
            accepted_tokens=self._speculation.accepted,
            steps=self._steps,
        )


def _introduce(sequence: Sequence, row: ScheduledSequence) -> NewSequence:
    """Tell the worker about a sequence; blocks for this step come with the row."""
    cached_blocks = len(sequence.block_ids) - len(row.new_block_ids)
    return NewSequence(
        seq_id=sequence.seq_id,
        token_ids=list(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        params=sequence.params,
        block_ids=sequence.block_ids[:cached_blocks],
        num_cached_tokens=row.start,
    )
