"""The outputs of one choice from its tokens alone, one token at a time: the same whenever they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from ullm.engine.output import Output
from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.tokenization.detokenizer import IncrementalDecoder, TextAssembler
from ullm.tokenization.stop_strings import StopString

Scores = list[TokenLogprobs] | None
"""Log probabilities, one per token; None: they were not asked for."""


class ChoiceEnd(msgspec.Struct, frozen=True):
    """How a choice ended.

    Args:
        reason, stop_reason: as in `ullm.engine.output.Output`.
        with_token: the last token brought the end; otherwise it came later, as a timeout does.
    """

    reason: str
    stop_reason: int | str | None = None
    with_token: bool = True


class _Decodes(Protocol):
    def detokenizer(
        self, *, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDecoder: ...

    def special_tokens_in(self, texts: Sequence[str]) -> dict[int, str]: ...


class ChoiceReplay:
    """Makes the outputs of a choice again.

    Args:
        index: which of the ``n`` choices.

    Attributes:
        num_cached_tokens: for the outputs; see `ullm.engine.output.Output`.
    """

    def __init__(self, index: int, prompt: list[int], params: SamplingParams, tokenizer: _Decodes) -> None:
        self.num_tokens = self.num_cached_tokens = 0
        self._index = index
        self._params = params
        self._num_prompt_tokens = len(prompt)
        decoder = tokenizer.detokenizer(
            prompt_token_ids=prompt, skip_special_tokens=params.skip_special_tokens
        )
        hidden = {}
        if params.stop_strings and params.skip_special_tokens:
            hidden = tokenizer.special_tokens_in(params.stop_strings)
        self._text = TextAssembler(
            decoder,
            [StopString(text) for text in params.stop_strings],
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            hidden=hidden,
        )

    def token(self, token_id: int, scores: Scores = None) -> Output:
        """Return the output of a token that is not the last.

        Args:
            scores: its log probabilities.
        """
        return self._output([token_id], self._text.push([token_id]).text, scores)

    def end(self, last: list[int], end: ChoiceEnd, scores: Scores = None) -> Output:
        """Return the last output.

        Args:
            last: the token that brought the end, if one did.
            scores: its log probabilities.
        """
        text, found = "", None
        by_token = end.reason == "stop" and not isinstance(end.stop_reason, str)
        if last and (self._params.include_stop_str_in_output or not by_token):
            delta = self._text.push(last)
            text, found = delta.text, delta.stop
        if found is None:
            text += self._text.flush().text
            included = self._params.include_stop_str_in_output and self._params.skip_special_tokens
            if included and isinstance(end.stop_reason, str) and not text.endswith(end.stop_reason):
                text += end.stop_reason  # a special token, which makes no text
        return self._output(last, text, scores, end)

    def _output(
        self, token_ids: list[int], text: str, scores: Scores, end: ChoiceEnd | None = None
    ) -> Output:
        self.num_tokens += len(token_ids)
        return Output(
            index=self._index,
            text=text,
            token_ids=token_ids,
            logprobs=scores,
            finish_reason=None if end is None else end.reason,
            stop_reason=None if end is None else end.stop_reason,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self.num_tokens,
            num_cached_tokens=self.num_cached_tokens,
        )
