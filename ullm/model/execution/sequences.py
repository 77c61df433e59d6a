"""A rank's record of its sequences, and the layout of each step made from it. Needs no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from ullm.model.attention.batch import BatchLayout
from ullm.protocol.messages import NewSequence, ScheduledSequence, Step
from ullm.scheduling.drafting import can_draft

Int32s = npt.NDArray[np.int32]
DeviceOnlyTokens = tuple[list[int], list[int]]
"""Tokens of a batch that only the device knows: indices in the batch, and slots in `LastTokens`."""


class BlockTables:
    """Block ids of many sequences, one row per slot. The array doubles when it grows, so growing is cheap."""

    def __init__(self) -> None:
        self._ids = np.zeros((8, 32), dtype=np.int32)

    def put(self, slot: int, first: int, block_ids: Sequence[int]) -> None:
        """Set a sequence's block ids from index ``first`` on."""
        end = first + len(block_ids)
        self._make_room(0, slot + 1)
        self._make_room(1, end)
        self._ids[slot, first:end] = block_ids
        if not first:
            self._ids[slot, end:] = 0

    def _make_room(self, axis: int, need: int) -> None:
        size = self._ids.shape[axis]
        if need > size:
            more = [(0, 0), (0, 0)]
            more[axis] = (0, max(need - size, size))
            self._ids = np.pad(self._ids, more)

    def rows(self, slots: list[int], width: int) -> Int32s:
        """Return a copy of some rows, ``[len(slots), width]``, padded with 0."""
        return self._ids[slots, :width]


@dataclass(slots=True)
class SequenceState:
    """A sequence as this rank knows it.

    Args:
        new: the message that introduced it.
        tokens: its tokens as they were sent; tokens sampled on this rank stay on the device.
        num_blocks: number of its KV blocks.
        slot: its slot in `LastTokens` and in `BlockTables`.
        num_sampled: tokens sampled on this rank since it was sent.
    """

    new: NewSequence
    tokens: Int32s
    num_blocks: int
    slot: int
    num_sampled: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens, sent and sampled."""
        return len(self.tokens) + self.num_sampled


@dataclass(slots=True)
class StepPlan:
    """A step's batch and the sequences that its results belong to.

    Args:
        layout: the batch for the model: decodes first, the longest first.
        sequences: the scheduled sequences in the layout's order, with what this rank knows of them.
        ends: per scheduled sequence, one more than the index of its last token in the batch.
        device_only_tokens: tokens of the batch that must be copied from `LastTokens`.
    """

    layout: BatchLayout
    sequences: list[tuple[ScheduledSequence, SequenceState]]
    ends: list[int]
    device_only_tokens: DeviceOnlyTokens


class SequenceTable:
    """All sequences of a rank, updated from each `Step`."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.sequences: dict[int, SequenceState] = {}
        self._blocks = BlockTables()
        self._free_slots: list[int] = []
        self.num_slots = 0

    def forget(self, seq_id: int) -> None:
        """Drop a sequence. Unknown ones are ignored: a stop and a preemption may cross on their way."""
        state = self.sequences.pop(seq_id, None)
        if state is not None:
            self._free_slots.append(state.slot)

    def add(self, new: NewSequence) -> None:
        """Add a sequence.

        Raises:
            ValueError: the sequence is known already, or has no tokens.
        """
        if new.seq_id in self.sequences:
            raise ValueError(f"sequence {new.seq_id} is known already; it must be forgotten first")
        if not new.token_ids:
            raise ValueError(f"sequence {new.seq_id} has no tokens")
        if not self._free_slots:
            self._free_slots.append(self.num_slots)
            self.num_slots += 1
        tokens = np.array(new.token_ids, dtype=np.int32)
        slot = self._free_slots.pop()
        self._blocks.put(slot, 0, new.block_ids)
        self.sequences[new.seq_id] = SequenceState(new, tokens, len(new.block_ids), slot)

    def plan(self, step: Step) -> StepPlan:
        """Append newly allocated blocks and lay out the step's batch.

        Raises:
            ValueError: a scheduled sequence cannot be computed; names it.
        """
        pairs = [(scheduled, self._update(scheduled)) for scheduled in step.scheduled]
        pairs.sort(key=_order)
        return self._lay_out(pairs)

    def _update(self, scheduled: ScheduledSequence) -> SequenceState:
        """Append new blocks, and check that the sequence can be computed."""
        state = self.sequences.get(scheduled.seq_id)
        if state is None:
            raise ValueError(f"a step schedules sequence {scheduled.seq_id}, which is not known")
        if scheduled.new_block_ids:
            self._blocks.put(state.slot, state.num_blocks, scheduled.new_block_ids)
            state.num_blocks += len(scheduled.new_block_ids)
        fault = self._fault(scheduled, state)
        if fault:
            raise ValueError(f"sequence {scheduled.seq_id}: {fault}")
        return state

    def _fault(self, scheduled: ScheduledSequence, state: SequenceState) -> str | None:
        """Return why the sequence cannot be computed; None if it can."""
        start, count, draft = scheduled.start, scheduled.count, len(scheduled.draft)
        end = start + count - draft  # of the known tokens, without guesses
        if count <= draft or start < 0 or end > state.num_tokens:
            return f"{count} tokens from {start} are scheduled, it has {state.num_tokens}"
        unsent = end - max(start, len(state.tokens))
        if unsent > 1 or (unsent == 1 and end != state.num_tokens):
            return f"only the last token sampled here is kept, not those up to {end}"
        if start + count > state.num_blocks * self.block_size:
            return f"{start + count} tokens do not fit its {state.num_blocks} blocks of {self.block_size}"
        if scheduled.sample and end != state.num_tokens:
            return f"sampling after token {end} of {state.num_tokens}"
        if draft and (not scheduled.sample or count != 1 + draft):
            return f"a draft of {draft} among {count} tokens"
        if draft and not can_draft(state.new.params):  # the scheduler never sends one
            return "a draft for a sequence with penalties or log probabilities"
        return None

    def _lay_out(self, pairs: list[tuple[ScheduledSequence, SequenceState]]) -> StepPlan:
        query_lens = [scheduled.count for scheduled, _ in pairs]
        starts = [scheduled.start for scheduled, _ in pairs]
        seq_lens = [scheduled.start + scheduled.count for scheduled, _ in pairs]
        ends = list(accumulate(query_lens))
        decodes = sum(count == 1 for count in query_lens)
        tables = self._blocks.rows([state.slot for _, state in pairs], -(-max(seq_lens) // self.block_size))
        positions, sequence_of_token = np.array(starts, dtype=np.int64), np.arange(len(pairs))
        if decodes < len(pairs):
            sequence_of_token = np.repeat(sequence_of_token, query_lens)
            before = np.array(ends) - np.array(query_lens) - positions
            positions = np.arange(ends[-1]) - before[sequence_of_token]
        blocks, offsets = np.divmod(positions, self.block_size)
        slots = tables[sequence_of_token, blocks] * np.int64(self.block_size) + offsets
        tokens, device_only_tokens = _tokens(pairs, ends)
        layout = BatchLayout(tokens, positions, query_lens, seq_lens, tables, slots, decodes)
        return StepPlan(layout, pairs, ends, device_only_tokens)


def _order(pair: tuple[ScheduledSequence, SequenceState]) -> tuple[bool, int]:
    """Sort key: decodes first, the longest first, so that attention can pad neighbours to one length."""
    scheduled, _ = pair
    return scheduled.count > 1, -scheduled.start if scheduled.count == 1 else 0


def _tokens(
    pairs: list[tuple[ScheduledSequence, SequenceState]], ends: list[int]
) -> tuple[npt.NDArray[np.int64], DeviceOnlyTokens]:
    """Return the batch's token ids, with 0 for those that only the device knows, and a list of the latter."""
    tokens = np.zeros(ends[-1], dtype=np.int64)
    indices: list[int] = []
    slots: list[int] = []
    for (scheduled, state), end in zip(pairs, ends, strict=True):
        start, count, draft = scheduled.start, scheduled.count, scheduled.draft
        known = min(start + count, len(state.tokens)) - start
        if known > 0:
            tokens[end - count : end - count + known] = state.tokens[start : start + known]
        if max(known, 0) + len(draft) < count:
            indices.append(end - 1 - len(draft))
            slots.append(state.slot)
        if draft:
            tokens[end - len(draft) : end] = draft
    return tokens, (indices, slots)
