"""Log probabilities of tokens and of their alternatives, copied to the host in the background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ullm.model.memory.fetch import Fetched
from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import MAX_LOGPROBS

CHUNK = 64
"""Rows converted to float32 at a time."""


@dataclass(slots=True)
class PendingLogprobs:
    """Log probabilities of some rows, on their way to the host.

    Args:
        rows: indices of these rows in the step.
        num_rows: number of rows in the step.
        counts: number of alternatives to report for each of ``rows``.
        columns: ``[rows]`` the tokens, their log probabilities, and their ranks, 1 for the most likely;
            ``[rows, MAX_LOGPROBS]`` log probabilities of the most likely tokens, and their ids.
    """

    rows: list[int]
    num_rows: int
    counts: list[int]
    columns: Fetched

    def result(self) -> list[TokenLogprobs | None]:
        """Wait for them; return one entry per row of the step, None for rows that are not in ``rows``."""
        results: list[TokenLogprobs | None] = [None] * self.num_rows
        tokens, chosen, ranks, top, top_ids = (column.tolist() for column in self.columns.wait())
        columns = (self.rows, self.counts, tokens, chosen, ranks)
        alternatives = zip(top_ids, top, strict=True)
        for (row, count, token, logprob, rank), (ids, values) in zip(
            zip(*columns, strict=True), alternatives, strict=True
        ):
            best = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
            results[row] = TokenLogprobs(token_id=token, logprob=logprob, rank=rank, top=best[:count])
        return results


def start_logprobs(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> PendingLogprobs:
    """Start computing the log softmax of ``logits`` at ``tokens`` and at the most likely tokens.

    Equal alternatives are ordered by their ids.

    Args:
        logits: ``[rows, vocab]`` in any float type.
        tokens: ``[rows]`` int64.
        counts: number of alternatives to report for each row, up to `ullm.sampling.MAX_LOGPROBS`.
    """
    starts = range(0, max(len(tokens), 1), CHUNK)
    pieces = [_logprobs(logits[start : start + CHUNK], tokens[start : start + CHUNK]) for start in starts]
    chosen, ranks, top, top_ids = (torch.cat(columns) for columns in zip(*pieces, strict=True))
    return PendingLogprobs(
        list(range(len(tokens))), len(tokens), list(counts), Fetched(tokens, chosen, ranks, top, top_ids)
    )


def _logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = logits.float()
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    own = logits.gather(1, tokens[:, None])
    ranks = (logits > own).sum(-1) + 1
    top, top_ids = logits.topk(min(MAX_LOGPROBS, logits.shape[1]), dim=-1)
    return (own - normaliser)[:, 0], ranks, top - normaliser, top_ids
