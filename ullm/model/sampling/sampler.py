"""The sampler: from logits to tokens.

For each row, in this order: penalties, logit bias, the ban of end tokens before ``min_tokens``; then, unless
the row is greedy, temperature, top_k, top_p over what top_k left, min_p (the order of transformers), and
sampling by inversion of the cumulative distribution. Log probabilities are those after the first three steps,
at temperature 1.

The random number of a token is a pure function of (seed, token index), and everything else is computed row by
row, so a row's token never depends on the rest of the batch. Filters are thresholds on the probability: ties
with the last kept token are kept, in whatever order a sort puts them. Sums that decide are float64.

What a grammar does not allow is impossible in the choice, and does not change log probabilities. Where only
an end is left, the ban of end tokens does not count.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ullm.grammars.matcher import Mask
from ullm.model.memory.fetch import Fetched
from ullm.model.memory.upload import select_rows, upload_list
from ullm.model.sampling.choose import ChooseTokens, choose_tokens, uniform
from ullm.model.sampling.constraints import Constraints
from ullm.model.sampling.logprobs import PendingLogprobs, start_logprobs
from ullm.model.sampling.penalties import PenaltyTable
from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import SamplingParams


@dataclass(slots=True)
class _SamplingState:
    """The sampler's state of one sequence.

    Args:
        params: the request's parameters.
        seed: the request's seed, or a random one.
        index: index of the next token to be generated.
        top_k: number of tokens to keep; 0: all.
        bias: token ids and the numbers to add to their logits.
        banned: end tokens that are impossible before ``min_tokens``.
        slot: slot in the penalty table; None without penalties.
    """

    params: SamplingParams
    seed: int
    index: int
    top_k: int
    bias: tuple[list[int], list[float]]
    banned: list[int] = field(default_factory=list)
    slot: int | None = None

    @property
    def bans(self) -> bool:
        """True while end tokens are banned."""
        return self.index < self.params.min_tokens and bool(self.banned)

    @property
    def adjusts(self) -> bool:
        """True if the logits must be changed before sampling."""
        return self.slot is not None or bool(self.bias[0]) or self.bans


class Sampler:
    """Chooses tokens for the sequences of one runner.

    Args:
        vocab_size: number of columns of the logits.
        device: where the logits are.
        eos_token_ids: tokens that ``min_tokens`` bans besides a request's own stop tokens.
        choose: returns one token per row of logits; see `ullm.model.sampling.choose.choose_tokens`.
        constraints: the grammars of constrained sequences; None where there can be none.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        eos_token_ids: tuple[int, ...],
        choose: ChooseTokens = choose_tokens,
        constraints: Constraints | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._eos_token_ids = eos_token_ids
        self._choose = choose
        self._constraints = constraints
        self._sequences: dict[int, _SamplingState] = {}
        self._penalties = PenaltyTable(vocab_size, device)
        self._adjusted: tuple[Tensor, dict[int, int]] | None = None

    @torch.inference_mode()
    def add(
        self,
        seq_id: int,
        params: SamplingParams,
        token_ids: list[int],
        num_prompt_tokens: int,
        grammar: str = "",
    ) -> None:
        """Add a sequence, new or resumed.

        Args:
            token_ids: the prompt and the tokens generated so far.
            num_prompt_tokens: length of the prompt; the rest counts as generated.
            grammar: what constrains it, in llguidance's format; empty if nothing does.
        """
        self.forget(seq_id)
        if (grammar or params.filters_tokens) and self._constraints is not None:
            self._constraints.add(seq_id, grammar, token_ids[num_prompt_tokens:], params)
        banned = {*self._eos_token_ids, *params.stop_token_ids}
        banned = {token for token in banned if token < self._vocab_size}
        bias = {token: value for token, value in params.logit_bias.items() if token < self._vocab_size}
        sequence = _SamplingState(
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            index=len(token_ids) - num_prompt_tokens,
            top_k=params.top_k if params.top_k < self._vocab_size else 0,
            bias=(list(bias), list(bias.values())),
            banned=sorted(banned) if len(banned) < self._vocab_size else [],
        )
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            prompt, output = token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:]
            sequence.slot = self._penalties.add(prompt, output)
        self._sequences[seq_id] = sequence

    def forget(self, seq_id: int) -> None:
        """Drop a sequence; an unknown one is ignored."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None and sequence.slot is not None:
            self._penalties.release(sequence.slot)
        if self._constraints is not None:
            self._constraints.forget(seq_id)

    def close(self) -> None:
        """Forget everything, and end the thread of the grammars."""
        if self._constraints is not None:
            self._constraints.close()

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        seq_ids: list[int],
        ahead: Sequence[int] | None = None,
        drafts: Mapping[int, Sequence[int]] = {},
    ) -> Tensor:
        """Sample the next token of each sequence and advance its index by one.

        Args:
            logits: ``[rows, vocab]`` in any float type; not changed.
            seq_ids: the sequence of each row; the same one twice only with different ``ahead``.
            ahead: distance of each row's token from its sequence's next one, with drafts. Such a sequence has
                neither penalties nor log probabilities. Call `advance` with the number of accepted guesses.
            drafts: the drafts of sequences that have one.

        Returns:
            ``[rows]`` int64 on the device; on CUDA the host does not wait for it.
        """
        sequences = [self._sequences[seq_id] for seq_id in seq_ids]
        if ahead is not None:  # copies: advancing them has no effect
            pairs = zip(sequences, ahead, strict=True)
            sequences = [replace(s, index=s.index + more) if more else s for s, more in pairs]
        rows, masks = self._masks(seq_ids, drafts)
        adjusted = self._adjust(logits, sequences, self._only_ends(sequences, rows, masks))
        self._adjusted = None if adjusted is logits else (adjusted, _positions(seq_ids))
        if self._constraints is not None and rows:
            adjusted = self._constraints.block(adjusted, rows, masks)
        filters = [(s.params.temperature, s.top_k, s.params.top_p, s.params.min_p) for s in sequences]
        uniforms = [0.0 if s.params.greedy else uniform(s.seed, s.index) for s in sequences]
        tokens = self._choose(adjusted, filters, uniforms)
        penalised = [row for row, sequence in enumerate(sequences) if sequence.slot is not None]
        if penalised:
            self._penalties.record(_slots(sequences), select_rows(tokens, penalised))
        for sequence in sequences:
            sequence.index += 1
        return tokens

    def follow(self, tokens: Fetched, counts: Mapping[int, tuple[int, int]]) -> None:
        """Go on in the grammars of constrained sequences; see `Constraints.follow`."""
        if self._constraints is not None:
            self._constraints.follow(tokens, counts)

    def errors(self, seq_ids: Sequence[int]) -> dict[int, str]:
        """Return why sequences of the last `sample` cannot go on in their grammars; mostly nothing."""
        if self._constraints is None:
            return {}
        return {seq_id: error for seq_id in seq_ids if (error := self._constraints.error(seq_id))}

    def advance(self, seq_id: int, count: int) -> None:
        """Advance a sequence's index by the ``count`` guesses that were accepted."""
        self._sequences[seq_id].index += count

    @torch.inference_mode()
    def start_logprobs(self, logits: Tensor, seq_ids: list[int], tokens: Tensor) -> PendingLogprobs:
        """Start computing the log probabilities of sampled tokens, without waiting for a GPU.

        Call it between `sample` and the next `sample`, with the same arguments.

        Args:
            tokens: the tokens that `sample` returned.
        """
        wanted = [self._sequences[seq_id].params.logprobs for seq_id in seq_ids]
        rows = [row for row, count in enumerate(wanted) if count is not None]
        source, positions = self._adjusted or (logits, _positions(seq_ids))
        chosen = select_rows(source, [positions[seq_ids[row]] for row in rows])
        pending = start_logprobs(
            chosen, select_rows(tokens, rows), [count for count in wanted if count is not None]
        )
        pending.rows, pending.num_rows = rows, len(seq_ids)
        return pending

    def logprobs(self, logits: Tensor, seq_ids: list[int], tokens: Tensor) -> list[TokenLogprobs | None]:
        """Return the log probabilities that `start_logprobs` starts; None for rows that want none."""
        return self.start_logprobs(logits, seq_ids, tokens).result()

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, next_token_ids: Sequence[int], k: int) -> list[TokenLogprobs]:
        """Return log probabilities of the prompt's own tokens, without penalties or bias.

        Args:
            logits: ``[positions, vocab]``.
            next_token_ids: the token that follows each position.
            k: number of alternatives to report.
        """
        tokens = upload_list(self._device, next_token_ids)
        entries = start_logprobs(logits, tokens, [k] * len(logits)).result()
        return [entry for entry in entries if entry is not None]

    def _masks(self, seq_ids: list[int], drafts: Mapping[int, Sequence[int]]) -> tuple[list[int], Mask]:
        """Return the rows of constrained sequences, and the tokens that each row may have."""
        constraints = self._constraints
        rows = [] if constraints is None else [row for row, seq in enumerate(seq_ids) if seq in constraints]
        if constraints is None or not rows:
            return [], np.empty((0, 0), np.int32)
        return rows, constraints.allowed([seq_ids[row] for row in rows], drafts)

    @staticmethod
    def _only_ends(sequences: list[_SamplingState], rows: list[int], masks: Mask) -> set[int]:
        """Return the rows whose grammar leaves nothing but tokens that are banned."""
        found = set()
        for row, mask in zip(rows, masks, strict=True):
            if sequences[row].bans:
                left, banned = mask.copy().view(np.uint32), np.array(sequences[row].banned)
                np.bitwise_and.at(left, banned // 32, ~(np.uint32(1) << (banned % 32).astype(np.uint32)))
                if not left.any():
                    found.add(row)
        return found

    def _adjust(self, logits: Tensor, sequences: list[_SamplingState], only_ends: set[int]) -> Tensor:
        """Return a float32 copy with penalties, bias and bans; ``logits`` itself if no row has any.

        Args:
            only_ends: rows without a ban.
        """
        if not any(sequence.adjusts for sequence in sequences):
            return logits
        logits = logits.to(torch.float32, copy=True)
        penalised = [row for row, sequence in enumerate(sequences) if sequence.slot is not None]
        if penalised:
            params = [sequences[row].params for row in penalised]
            factors = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
            self._penalties.apply(logits, penalised, _slots(sequences), self._upload(factors))
        biased = [(row, sequence.bias) for row, sequence in enumerate(sequences) if sequence.bias[0]]
        if biased:
            where = self._entries([(row, ids) for row, (ids, _) in biased])
            values = self._upload([value for _, (_, values) in biased for value in values])
            logits[where] += values.float()
        banning = [row for row, sequence in enumerate(sequences) if sequence.bans and row not in only_ends]
        banned = [(row, sequences[row].banned) for row in banning]
        if banned:
            logits[self._entries(banned)] = -torch.inf
        return logits

    def _entries(self, ids_of_rows: list[tuple[int, list[int]]]) -> tuple[Tensor, Tensor]:
        """Return row and column indices of token ids, which are given by row."""
        pairs = [(row, token) for row, ids in ids_of_rows for token in ids]
        rows, columns = upload_list(self._device, pairs).unbind(1)
        return rows, columns

    def _upload(self, values: Sequence[object]) -> Tensor:
        return upload_list(self._device, values, np.float64)


def _positions(seq_ids: list[int]) -> dict[int, int]:
    return {seq_id: row for row, seq_id in enumerate(seq_ids)}


def _slots(sequences: list[_SamplingState]) -> list[int]:
    return [sequence.slot for sequence in sequences if sequence.slot is not None]
