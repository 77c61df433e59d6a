"""What a rank remembers of its sequences, and the layout of a step made from it. Needs no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from ullm.model.attention.batch import Layout
from ullm.protocol.messages import NewSequence, ScheduledSequence, Step
from ullm.scheduling.drafting import can_draft

Int32s = npt.NDArray[np.int32]


class BlockTables:
    """The block ids of many sequences, each in the row of its slot; doubling keeps growing cheap."""

    def __init__(self) -> None:
        self._ids = np.zeros((8, 32), dtype=np.int32)

    def put(self, slot: int, first: int, block_ids: Sequence[int]) -> None:
        """``block_ids`` become those from ``first`` on of a sequence."""
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
        """``[len(slots), width]``, copied and padded with 0."""
        return self._ids[slots, :width]


@dataclass(slots=True)
class SequenceState:
    """A sequence as this rank knows it.

    Args:
        tokens: those that were sent; what this rank samples stays on the device.
        num_blocks: how many it has.
        slot: where its last sampled token is on the device, and its blocks in `BlockTables`.
        num_sampled: tokens sampled here since it was sent.
    """

    new: NewSequence
    tokens: Int32s
    num_blocks: int
    slot: int
    num_sampled: int = 0

    @property
    def num_tokens(self) -> int:
        """Sent and sampled ones."""
        return len(self.tokens) + self.num_sampled


@dataclass(slots=True)
class Plan:
    """A step's layout and what to do with its outcome.

    Args:
        layout: what the model computes; decodes first, the longest first.
        rows: the step's rows in the layout's order, with their sequences.
        ends: per row, index of its last token in the batch, plus one.
        fresh: indices of tokens that are only on the device, and the slots that they are in.
    """

    layout: Layout
    rows: list[tuple[ScheduledSequence, SequenceState]]
    ends: list[int]
    fresh: tuple[list[int], list[int]]


class SequenceTable:
    """All sequences of a rank, kept up to date by the deltas in each `Step`."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.sequences: dict[int, SequenceState] = {}
        self._blocks = BlockTables()
        self._free_slots: list[int] = []
        self.num_slots = 0

    def forget(self, seq_id: int) -> None:
        """Drop a sequence; unknown ones are ignored, since a stop may cross a preemption."""
        state = self.sequences.pop(seq_id, None)
        if state is not None:
            self._free_slots.append(state.slot)

    def add(self, new: NewSequence) -> None:
        """Take up a sequence.

        Raises:
            ValueError: it is known already, or has no tokens.
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

    def plan(self, step: Step) -> Plan:
        """Append the rows' blocks and lay the step out.

        Raises:
            ValueError: a row that cannot be computed; names the sequence.
        """
        pairs = [(row, self._update(row)) for row in step.scheduled]
        pairs.sort(key=_order)
        return self._lay_out(pairs)

    def _update(self, row: ScheduledSequence) -> SequenceState:
        state = self.sequences.get(row.seq_id)
        if state is None:
            raise ValueError(f"a step has a row of sequence {row.seq_id}, which is not known")
        if row.new_block_ids:
            self._blocks.put(state.slot, state.num_blocks, row.new_block_ids)
            state.num_blocks += len(row.new_block_ids)
        needed = row.start + row.count
        end = needed - len(row.draft)  # of what is known, not guessed
        if row.count <= len(row.draft) or row.start < 0 or end > state.num_tokens:
            raise ValueError(
                f"sequence {row.seq_id}: row of {row.count} from {row.start}, it has {state.num_tokens}"
            )
        unsent = end - max(row.start, len(state.tokens))
        if unsent > 1 or (unsent == 1 and end != state.num_tokens):
            raise ValueError(
                f"sequence {row.seq_id}: only the last token sampled here is kept, not those up to {end}"
            )
        if needed > state.num_blocks * self.block_size:
            raise ValueError(
                f"sequence {row.seq_id} needs room for {needed} tokens, but has {state.num_blocks} blocks "
                f"of {self.block_size}"
            )
        if row.sample and end != state.num_tokens:
            raise ValueError(f"sequence {row.seq_id}: sampling after token {end} of {state.num_tokens}")
        if row.draft:
            _check_draft(row, state)
        return state

    def _lay_out(self, pairs: list[tuple[ScheduledSequence, SequenceState]]) -> Plan:
        query_lens = [row.count for row, _ in pairs]
        starts = [row.start for row, _ in pairs]
        seq_lens = [row.start + row.count for row, _ in pairs]
        ends = list(accumulate(query_lens))
        decodes = sum(count == 1 for count in query_lens)
        tables = self._blocks.rows([state.slot for _, state in pairs], -(-max(seq_lens) // self.block_size))
        positions, row_of_token = np.array(starts, dtype=np.int64), np.arange(len(pairs))
        if decodes < len(pairs):
            row_of_token = np.repeat(row_of_token, query_lens)
            before = np.array(ends) - np.array(query_lens) - positions
            positions = np.arange(ends[-1]) - before[row_of_token]
        blocks, offsets = np.divmod(positions, self.block_size)
        slots = tables[row_of_token, blocks] * np.int64(self.block_size) + offsets
        tokens, fresh = _tokens(pairs, ends)
        layout = Layout(tokens, positions, query_lens, seq_lens, tables, slots, decodes)
        return Plan(layout, pairs, ends, fresh)


def _check_draft(row: ScheduledSequence, state: SequenceState) -> None:
    """Raise ValueError for one whose tokens cannot be drawn at once; the scheduler never asks for that."""
    if not row.sample or row.count != 1 + len(row.draft):
        raise ValueError(f"sequence {row.seq_id}: a draft of {len(row.draft)} in a row of {row.count}")
    if not can_draft(state.new.params):
        raise ValueError(f"sequence {row.seq_id}: penalties and log probabilities go without drafts")


def _order(pair: tuple[ScheduledSequence, SequenceState]) -> tuple[bool, int]:
    """Decodes first, the longest first, so that attention can pad neighbours to one length."""
    row, _ = pair
    return row.count > 1, -row.start if row.count == 1 else 0


def _tokens(
    pairs: list[tuple[ScheduledSequence, SequenceState]], ends: list[int]
) -> tuple[npt.NDArray[np.int64], tuple[list[int], list[int]]]:
    """Token ids of the batch; those that only the device knows are 0, and listed with their slots."""
    tokens = np.zeros(ends[-1], dtype=np.int64)
    indices: list[int] = []
    slots: list[int] = []
    for (row, state), end in zip(pairs, ends, strict=True):
        known = min(row.start + row.count, len(state.tokens)) - row.start
        if known > 0:
            tokens[end - row.count : end - row.count + known] = state.tokens[row.start : row.start + known]
        if max(known, 0) + len(row.draft) < row.count:
            indices.append(end - 1 - len(row.draft))
            slots.append(state.slot)
        if row.draft:
            tokens[end - len(row.draft) : end] = row.draft
    return tokens, (indices, slots)
