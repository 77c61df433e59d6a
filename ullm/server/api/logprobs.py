"""Log probabilities in the formats of completions, chat completions, and vLLM's prompt scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import msgspec
import trio

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

SLICE = 128
"""Tokens, with up to 20 alternatives each, that are put into shape before other tasks run."""

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class TokenNames(Protocol):
    """The texts that stand for tokens in log probabilities; a tokenizer has its own."""

    def token_text(self, token_id: int) -> str:
        """Return one token as text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return one token's bytes."""


class TokenIdNames:
    """Tokens named by their ids, as vLLM does: ``token_id:17``."""

    def __init__(self, tokenizer: TokenNames) -> None:
        self.token_bytes = tokenizer.token_bytes

    def token_text(self, token_id: int) -> str:
        """Return a token's name."""
        return f"token_id:{token_id}"


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
    names: TokenNames,
    offsets: Offsets,
) -> CompletionLogprobs:
    """Return one entry per token; a token without a score, such as a prompt's first, has null."""
    logprobs = CompletionLogprobs([], [], [], [])
    for token_id, score in zip(token_ids, scores, strict=True):
        text = names.token_text(token_id)
        logprobs.tokens.append(text)
        logprobs.text_offset.append(offsets.next(token_id))
        logprobs.token_logprobs.append(None if score is None else finite(score.logprob))
        logprobs.top_logprobs.append(None if score is None else _top(text, score, names))
    return logprobs


async def scored_prompt(
    token_ids: Sequence[int],
    scores: Sequence[TokenLogprobs | None],
    names: TokenNames,
    offsets: Offsets,
) -> CompletionLogprobs:
    """Return `completion_logprobs` of a whole prompt; other tasks run in between.

    An aborted request may have fewer scores than tokens.
    """
    scores = [*scores, *[None] * (len(token_ids) - len(scores))]
    logprobs = CompletionLogprobs([], [], [], [])
    for some in _slices(len(token_ids)):
        extend(logprobs, completion_logprobs(token_ids[some], scores[some], names, offsets))
        await trio.lowlevel.checkpoint()
    return logprobs


def _top(text: str, score: TokenLogprobs, names: TokenNames) -> dict[str, float]:
    """Return the candidates by their text, one entry each, also where several have the same text."""
    top, taken = {}, {text}
    for token_id, logprob in score.top:
        name = text if token_id == score.token_id else _distinct(token_id, names, taken)
        taken.add(name)
        top[name] = finite(logprob)
    return cast(dict[str, float], _encoded({**top, text: finite(score.logprob)}))


def _slices(length: int) -> Iterator[slice]:
    return (slice(start, start + SLICE) for start in range(0, length, SLICE))


def _encoded(value: object) -> msgspec.Raw:
    """Return a part of an answer as JSON, which stands for it in the whole.

    So that to encode the whole, which is one call that nothing interrupts, is little more than to copy it.
    """
    return msgspec.Raw(msgspec.json.encode(value))


def _distinct(token_id: int, names: TokenNames, taken: set[str]) -> str:
    """Return a token's text; where another one has it, its bytes in OpenAI's form, or its id."""
    raw = "bytes:" + "".join(f"\\x{byte:02x}" for byte in names.token_bytes(token_id))
    candidates = (names.token_text(token_id), raw)
    return next((name for name in candidates if name not in taken), f"token_id:{token_id}")


def extend(into: CompletionLogprobs, more: CompletionLogprobs) -> None:
    """Append the entries of ``more``."""
    into.tokens += more.tokens
    into.token_logprobs += more.token_logprobs
    into.top_logprobs += more.top_logprobs
    into.text_offset += more.text_offset


def chat_logprobs(scores: Sequence[TokenLogprobs], names: TokenNames) -> ChatLogprobs:
    """Return one entry per token."""
    return ChatLogprobs([cast(TokenLogprob, _encoded(_token(score, names))) for score in scores])


def response_logprobs(scores: Sequence[TokenLogprobs], names: TokenNames) -> list[dict[str, Any]]:
    """Return one entry per token, as an object."""
    return [msgspec.to_builtins(_token(score, names)) for score in scores]


def _token(score: TokenLogprobs, names: TokenNames) -> TokenLogprob:
    top = [
        TopLogprob(names.token_text(token_id), finite(logprob), list(names.token_bytes(token_id)))
        for token_id, logprob in score.top
    ]
    own = (
        names.token_text(score.token_id),
        finite(score.logprob),
        list(names.token_bytes(score.token_id)),
    )
    return TokenLogprob(*own, top_logprobs=top)


async def prompt_logprobs(
    scores: Sequence[TokenLogprobs | None] | None, names: TokenNames
) -> PromptLogprobs | None:
    """Return the candidates per prompt token by token id, its own included; None where there is no score.

    Other tasks run in between. The entries are encoded already.
    """
    if scores is None:
        return None
    entries: list[msgspec.Raw | None] = []
    for some in _slices(len(scores)):
        for score in scores[some]:
            entries.append(None if score is None else _encoded(_candidates(score, names)))
        await trio.lowlevel.checkpoint()
    return cast(PromptLogprobs, entries)


def _candidates(score: TokenLogprobs, names: TokenNames) -> dict[str, PromptLogprob]:
    def candidate(token_id: int, logprob: float, rank: int | None) -> PromptLogprob:
        return PromptLogprob(finite(logprob), rank, names.token_text(token_id))

    own = {str(score.token_id): candidate(score.token_id, score.logprob, score.rank or None)}
    ranked = enumerate(score.top, 1)
    return own | {str(token_id): candidate(token_id, logprob, rank) for rank, (token_id, logprob) in ranked}
