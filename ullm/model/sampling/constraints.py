"""Constraints: which tokens each constrained sequence may have next, computed beside the model's step.

As soon as a step's tokens are known, a thread goes on in the grammars and computes the masks of the next
step, while results are sent and the next step's layers are computed; llguidance does not hold the
interpreter's lock meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ullm.grammars.matcher import Mask, MatcherFactory
from ullm.grammars.thinking_budget import ThinkingBudget
from ullm.grammars.token_filter import Matcher, TokenFilter
from ullm.model.memory.fetch import Fetched
from ullm.model.memory.upload import upload
from ullm.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class _Constrained:
    """One sequence: where it is in its grammar, and the mask for its next token.

    Args:
        matcher: None until the thread has made it, and if that failed.
        error: why it cannot go on; empty if it can.
    """

    mask: Mask
    matcher: Matcher | None = None
    error: str = ""


class Constraints:
    """The grammars of one rank's sequences.

    Args:
        make_factory: reads the tokenizer, which takes some tenths of a second; called in the thread, ahead or
            for the first constrained sequence.
        vocab_size: number of the logits.
    """

    def __init__(self, make_factory: Callable[[], MatcherFactory], vocab_size: int) -> None:
        self._make_factory = make_factory
        self._factory: MatcherFactory | None = None
        self._words = -(-vocab_size // 32)
        self._vocab_size = vocab_size
        self._sequences: dict[int, _Constrained] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._sequences

    def prepare(self) -> None:
        """Read the tokenizer now, in the thread: later all sequences would wait, not only those constrained.

        An error is told to the sequences that need the tokenizer, for which it is tried again.
        """
        self._submit(self._prepare)

    def add(self, seq_id: int, definition: str, output: Sequence[int], params: SamplingParams) -> None:
        """Add a sequence, new or resumed.

        Args:
            definition: its grammar, in llguidance's format; empty if it has none.
            output: the tokens generated so far.
            params: say which tokens are allowed, and which words are not.
        """
        sequence = self._sequences[seq_id] = _Constrained(np.full(self._words, -1, np.int32))
        output = list(output)
        self._submit(lambda: self._begin(sequence, definition, output, params))

    def forget(self, seq_id: int) -> None:
        """Drop a sequence; one that is not constrained is ignored."""
        self._sequences.pop(seq_id, None)

    def follow(self, tokens: Fetched, counts: Mapping[int, tuple[int, int]]) -> None:
        """Go on in the grammars over tokens that were sampled, once they are on the host.

        Args:
            tokens: the step's tokens.
            counts: sequence → index of its first one, and their number; others are ignored.
        """
        advanced = [(self._sequences[seq], *place) for seq, place in counts.items() if seq in self._sequences]
        if advanced:
            self._submit(lambda: _advance(tokens, advanced))

    def allowed(self, seq_ids: Sequence[int], drafts: Mapping[int, Sequence[int]]) -> Mask:
        """Wait for the masks of some constrained sequences.

        Args:
            seq_ids: one per row; a sequence with a draft has one more row than its draft has tokens.
            drafts: the drafts of those that have one.

        Returns:
            ``[rows, words]``.
        """
        if self._last is not None:
            self._last.result()
        masks, row = np.full((len(seq_ids), self._words), -1, np.int32), 0
        while row < len(seq_ids):
            sequence, draft = self._sequences[seq_ids[row]], drafts.get(seq_ids[row], ())
            end = row + 1 + len(draft)
            if draft and sequence.matcher is not None:
                sequence.matcher.fill_ahead(draft, masks[row:end])
            else:
                masks[row] = sequence.mask
            row = end
        return masks

    def error(self, seq_id: int) -> str:
        """Return why a sequence cannot go on in its grammar; empty if it can, or has none."""
        sequence = self._sequences.get(seq_id)
        return "" if sequence is None else sequence.error

    def block(self, logits: Tensor, rows: Sequence[int], masks: Mask) -> Tensor:
        """Return a copy of ``logits [all rows, vocab]`` with -inf for tokens that masks do not allow.

        Adds 0 or -inf, eight tokens of a table at a time: a tenth of the time of ``masked_fill`` on CPUs.
        """
        device = logits.device
        words, where = upload(device, masks, np.array(rows))
        table = _penalties(logits.dtype, device)
        octets = words.view(torch.uint8).to(torch.int32).view(-1)
        added = table.index_select(0, octets).view(len(masks), -1)[:, : self._vocab_size]
        if len(rows) == len(logits):
            return logits + added
        return logits.index_add(0, where, added)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = self._last = None
        self._sequences.clear()

    # --- in the thread -------------------------------------------------------------------------------

    def _submit(self, work: Callable[[], None]) -> None:
        if self._thread is None:  # one thread, which does everything in order
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ullm-grammar")
        self._last = self._thread.submit(work)

    def _prepare(self) -> None:
        with suppress(Exception):
            self._factory = self._make_factory()

    def _begin(
        self, sequence: _Constrained, definition: str, output: Sequence[int], params: SamplingParams
    ) -> None:
        try:
            sequence.matcher = self._matcher(definition, params)
        except Exception as error:  # such as a file that has vanished; the request is told
            sequence.error = f"{type(error).__name__}: {error}"
            return
        sequence.matcher.consume(output)
        _compute(sequence)

    def _matcher(self, definition: str, params: SamplingParams) -> Matcher:
        if definition and self._factory is None:
            self._factory = self._make_factory()
        grammar = self._factory.make(definition) if definition and self._factory is not None else None
        if grammar is not None and not params.filters_tokens:
            return grammar
        matcher = self._filtered(grammar, params)
        budget, thinking = params.thinking_token_budget, params.thinking_tokens
        if budget is None or thinking is None or not 0 <= thinking.end < self._vocab_size:
            return matcher or TokenFilter((), ())
        return ThinkingBudget(thinking, budget, matcher)

    def _filtered(self, grammar: Matcher | None, params: SamplingParams) -> Matcher | None:
        """Return what goes on in a grammar among some tokens only; None if nothing is constrained."""
        if not (params.allowed_token_ids or params.bad_word_ids):
            return grammar
        allowed = [token for token in params.allowed_token_ids if token < self._vocab_size]
        words = [word for word in params.bad_word_ids if max(word) < self._vocab_size]
        return TokenFilter(allowed, words, grammar)


def _advance(tokens: Fetched, advanced: Sequence[tuple[_Constrained, int, int]]) -> None:
    token_ids = tokens.wait()[0].tolist()
    for sequence, first, count in advanced:
        if sequence.matcher is not None:
            sequence.matcher.consume(token_ids[first : first + count])
            _compute(sequence)


def _compute(sequence: _Constrained) -> None:
    assert sequence.matcher is not None, "the caller has checked"
    sequence.matcher.fill(sequence.mask)
    sequence.error = sequence.matcher.error


@cache
def _penalties(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what eight bits of a mask add to logits, ``[256, 8]``: 0 where a bit is 1, else -inf."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits, 0.0, -np.inf)).to(device, dtype)
