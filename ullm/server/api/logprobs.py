"""Log probabilities in the formats of completions, chat completions, and vLLM's prompt scores."""

from __future__ import annotations

from collections.abc import Sequence

from ullm.protocol.messages import TokenLogprobs
from ullm.server.api.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from ullm.server.api.types import TokenizerInterface

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def finite(logprob: float) -> float:
    """Return a log probability that JSON can represent."""
    return max(logprob, LEAST_LOGPROB)


class Offsets:
    """Computes where each token begins in the text; the result does not depend on how tokens are batched.

    Tokens that share a character begin where it begins. A stop string that is held back changes nothing.

    Args:
        start: characters before the first token.
        prompt_token_ids: the tokens that precede them.
    """

    def __init__(
        self,
        tokenizer: TokenizerInterface,
        start: int = 0,
        *,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = tokenizer.detokenizer(
            prompt_token_ids=prompt_token_ids, skip_special_tokens=skip_special_tokens
        )
        self._offset = start

    def next(self, token_id: int) -> int:
        """Return the offset of the next token."""
        offset = self._offset
        self._offset += len(self._decoder.push((token_id,)))
        return offset


def completion_logprobs(
    token_ids: Sequence[int],
    scores: Sequence[TokenLogprobs | None],
    tokenizer: TokenizerInterface,
    offsets: Offsets,
) -> CompletionLogprobs:
    """Return one entry per token; a token without a score, such as a prompt's first, has null."""
    logprobs = CompletionLogprobs([], [], [], [])
    for token_id, score in zip(token_ids, scores, strict=True):
        text = tokenizer.token_text(token_id)
        logprobs.tokens.append(text)
        logprobs.text_offset.append(offsets.next(token_id))
        logprobs.token_logprobs.append(None if score is None else finite(score.logprob))
        logprobs.top_logprobs.append(None if score is None else _top(text, score, tokenizer))
    return logprobs


def _top(text: str, score: TokenLogprobs, tokenizer: TokenizerInterface) -> dict[str, float]:
    top = {tokenizer.token_text(token_id): finite(logprob) for token_id, logprob in score.top}
    return {**top, text: finite(score.logprob)}


def extend(into: CompletionLogprobs, more: CompletionLogprobs) -> None:
    """Append the entries of ``more``."""
    into.tokens += more.tokens
    into.token_logprobs += more.token_logprobs
    into.top_logprobs += more.top_logprobs
    into.text_offset += more.text_offset


def chat_logprobs(scores: Sequence[TokenLogprobs], tokenizer: TokenizerInterface) -> ChatLogprobs:
    """Return one entry per token."""
    return ChatLogprobs([_token(score, tokenizer) for score in scores])


def _token(score: TokenLogprobs, tokenizer: TokenizerInterface) -> TokenLogprob:
    top = [
        TopLogprob(tokenizer.token_text(token_id), finite(logprob), list(tokenizer.token_bytes(token_id)))
        for token_id, logprob in score.top
    ]
    own = (
        tokenizer.token_text(score.token_id),
        finite(score.logprob),
        list(tokenizer.token_bytes(score.token_id)),
    )
    return TokenLogprob(*own, top_logprobs=top)


def prompt_logprobs(
    scores: Sequence[TokenLogprobs | None] | None, tokenizer: TokenizerInterface
) -> PromptLogprobs | None:
    """Return the candidates per prompt token by token id, its own included; None where there is no score."""
    if scores is None:
        return None
    return [None if score is None else _candidates(score, tokenizer) for score in scores]


def _candidates(score: TokenLogprobs, tokenizer: TokenizerInterface) -> dict[str, PromptLogprob]:
    def candidate(token_id: int, logprob: float, rank: int | None) -> PromptLogprob:
        return PromptLogprob(finite(logprob), rank, tokenizer.token_text(token_id))

    own = {str(score.token_id): candidate(score.token_id, score.logprob, score.rank or None)}
    ranked = enumerate(score.top, 1)
    return own | {str(token_id): candidate(token_id, logprob, rank) for rank, (token_id, logprob) in ranked}
