"""Repetition, presence and frequency penalties, computed on the device.

Each penalised sequence has a slot with a count of each generated token and a list of the tokens that any
penalty applies to. Sampled tokens are recorded as device tensors, so the host does not wait for them.
Applying the penalties takes time in the length of the sequences, not in the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ullm.model.memory.upload import select_rows, upload, upload_list

MIN_SLOTS = 8
MIN_CAPACITY = 256


class PenaltyTable:
    """Slots of penalised sequences.

    Args:
        vocab_size: number of columns of the logits.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._history = torch.zeros(0, MIN_CAPACITY, dtype=torch.int64, device=device)
        self._lengths: list[int] = []
        self._free: list[int] = []

    def add(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
        """Allocate a slot for a sequence with these tokens; return its number."""
        prompt = [token for token in dict.fromkeys(prompt_ids) if token < self._vocab_size]
        output = [token for token in output_ids if token < self._vocab_size]
        slot = self._take_slot()
        self._reserve(len(prompt) + len(output) + 1)
        counts = np.bincount(np.array(output, dtype=np.int64), minlength=self._vocab_size).astype(np.int32)
        tokens, generated = upload(self._device, np.array(prompt + output, dtype=np.int64), counts)
        self._lengths[slot] = len(tokens)
        if len(tokens):
            self._history[slot] = tokens[0]  # padding repeats an entry, which changes nothing
            self._history[slot, : len(tokens)] = tokens
        self._counts[slot] = generated
        return slot

    def release(self, slot: int) -> None:
        """Free a slot."""
        self._free.append(slot)

    def apply(self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], factors: Tensor) -> None:
        """Penalise ``logits`` in place.

        The repetition penalty divides positive and multiplies negative logits of all tokens seen
        (arXiv:1909.05858); then presence and frequency penalties are subtracted for generated ones
        (OpenAI API reference, "frequency and presence penalties").

        Args:
            logits: ``[all rows, vocab]`` float32.
            rows: indices of the rows to penalise.
            slots: the slot of each of these rows.
            factors: ``[rows, 3]`` repetition, presence and frequency penalty.
        """
        filled = [index for index, slot in enumerate(slots) if self._lengths[slot]]
        if not filled:
            return
        where = self._index([slots[index] for index in filled])[:, None]
        row = self._index([rows[index] for index in filled])[:, None]
        longest = max(self._lengths[slots[index]] for index in filled)
        tokens = self._history[where[:, 0], :longest]
        counts = self._counts[where, tokens]
        repetition, presence, frequency = select_rows(factors, filled).float().unsqueeze(2).unbind(1)
        values = logits[row, tokens]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[row, tokens] = values - frequency * counts - presence * (counts > 0)

    def record(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Count one generated token for each of ``slots``.

        Args:
            slots: slots that differ from each other.
            tokens: ``[slots]`` int64 on the device.
        """
        self._reserve(max(self._lengths[slot] for slot in slots) + 1)
        where = self._index(slots)
        self._counts[where, tokens] += 1  # slots differ, so no entry is written twice
        ends = self._index([self._lengths[slot] for slot in slots])
        first = [slot for slot in slots if not self._lengths[slot]]
        if first:
            begun = [index for index, slot in enumerate(slots) if slot in first]
            self._history[self._index(first)] = select_rows(tokens, begun)[:, None]
        self._history[where, ends] = tokens
        for slot in slots:
            self._lengths[slot] += 1

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return upload_list(self._device, numbers)

    def _take_slot(self) -> int:
        if not self._free:
            old = len(self._lengths)
            size = max(MIN_SLOTS, 2 * old)
            counts, history = self._counts, self._history
            self._counts = counts.new_zeros(size, self._vocab_size)
            self._counts[:old] = counts
            self._history = history.new_zeros(size, history.shape[1])
            self._history[:old] = history
            self._lengths += [0] * (size - old)
            self._free = list(range(size - 1, old - 1, -1))
        return self._free.pop()

    def _reserve(self, capacity: int) -> None:
        have = self._history.shape[1]
        if capacity > have:
            padding = self._history[:, :1].expand(-1, max(capacity, 2 * have) - have)
            self._history = torch.cat([self._history, padding], dim=1)
