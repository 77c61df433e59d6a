"""Reads an answer token by token: its parts, each with the log probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ullm.parsing.parts import Part, Reasoning, Text
from ullm.parsing.tool_use import Reading
from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.server.api.logprobs import response_logprobs
from ullm.server.api.types import TokenizerInterface

ScoredPart = tuple[Part, list[dict[str, Any]]]
"""A part, and the log probabilities of its tokens as ``/v1/responses`` shows them; only texts have any."""


class AnswerParts:
    """Makes parts of tokens.

    A token that makes no text yet, as it is part of a character or of a tag, counts to the next text.

    Args:
        prompt: what the tokens follow.
        reading: how their text is read.

    Attributes:
        reasoning_tokens: number of the tokens so far that made reasoning; the tag before it counts, too.
    """

    def __init__(
        self, prompt: list[int], params: SamplingParams, reading: Reading, tokenizer: TokenizerInterface
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.detokenizer(
            prompt_token_ids=prompt, skip_special_tokens=params.skip_special_tokens
        )
        self._parser = None if reading.parser is None else reading.parser()
        self._scores: list[TokenLogprobs] = []
        self._unread = 0  # tokens that have made no part yet
        self.reasoning_tokens = 0

    def push(self, token_id: int, score: TokenLogprobs | None = None) -> Iterator[ScoredPart]:
        """Return the parts that a token makes.

        Args:
            score: its log probabilities, if they were asked for.
        """
        if score is not None:
            self._scores.append(score)
        self._unread += 1
        parts = self._parsed(self._decoder.push((token_id,)))
        if parts:
            self.reasoning_tokens += self._unread * any(isinstance(part, Reasoning) for part in parts)
            self._unread = 0
        return self._scored(parts)

    def finish(self) -> Iterator[ScoredPart]:
        """Return what was held back, after the last token."""
        rest = self._parsed(self._decoder.flush())
        return self._scored(rest + (list(self._parser.finish()) if self._parser is not None else []))

    def _parsed(self, text: str) -> list[Part]:
        if self._parser is not None:
            return list(self._parser.push(text))
        return [Text(text)] if text else []

    def _scored(self, parts: list[Part]) -> Iterator[ScoredPart]:
        scores: list[TokenLogprobs] = []
        if parts:
            scores, self._scores = self._scores, []
        for part in parts:
            if isinstance(part, Text):
                yield part, response_logprobs(scores, self._tokenizer)
                scores = []
            else:
                yield part, []
