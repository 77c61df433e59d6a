"""Pooling: one vector for a whole prompt, from the hidden states of its tokens, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ullm.protocol.messages import NewSequence, ScheduledSequence


class Pooling:
    """The sums of the prompts that are being pooled."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def forget(self, seq_id: int) -> None:
        """Drop a sequence; one that is not pooled is ignored."""
        self._sums.pop(seq_id, None)

    def take(self, new: NewSequence, scheduled: ScheduledSequence, hidden: Tensor) -> Tensor | None:
        """Take a chunk of a prompt.

        Args:
            new: the sequence, whose parameters say how it is pooled.
            scheduled: which of its positions were computed.
            hidden: their hidden states after the final norm, ``[count, hidden_size]``.

        Returns:
            ``[hidden_size]`` in float32 with the prompt's last chunk, a copy; None before and after.
        """
        size = new.num_prompt_tokens
        count = min(scheduled.start + scheduled.count, size) - scheduled.start
        if count < 1:
            return None
        own, is_last = hidden[:count], scheduled.start + count == size
        if new.params.pooling == "last":
            return own[-1].to(torch.float32, copy=True) if is_last else None
        total = own.sum(0, dtype=torch.float32)
        before = self._sums.pop(new.seq_id, None)
        if scheduled.start and before is not None:
            total = before + total
        if is_last:
            return total / size
        self._sums[new.seq_id] = total
        return None
