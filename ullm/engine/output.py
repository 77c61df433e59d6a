"""The choices of a request as text: what a reader has not read of them yet."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ullm.protocol.messages import TokenLogprobs
from ullm.scheduling.request import RequestRecord
from ullm.tokenization.detokenizer import TextAssembler


class Output(msgspec.Struct, frozen=True, gc=False):
    """New text and tokens of one choice since its last output.

    Args:
        index: which of the ``n`` choices.
        text: final, so it may be shown; empty while a character or a possible stop string is incomplete.
        logprobs: one per token of ``token_ids``, if requested; but for those that a request has begun with.
        finish_reason: ``stop``, ``length``, ``abort`` or ``timeout`` in the last output of the choice.
        stop_reason: the stop string or stop token that ended it; None for an end-of-sequence token.
        num_generated_tokens: tokens of this choice so far.
        num_cached_tokens: prompt tokens that were not computed because their KV was in the prefix cache.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0


class ChoiceReader:
    """Reads one choice: its record, its text, and how much of it has been read.

    Args:
        stop_tokens: special tokens that end it → how they are written, which is what the client asked for.
    """

    def __init__(
        self, index: int, record: RequestRecord, text: TextAssembler, stop_tokens: Mapping[int, str]
    ) -> None:
        self.index = index
        self.record = record
        self.text = text
        self._stop_tokens = stop_tokens
        self.read = 0
        self.finished = False

    @property
    def has_news(self) -> bool:
        """Whether there is something to read, or the choice has failed."""
        return not self.finished and (self.record.done or len(self.record.token_ids) > self.read)

    def next(self) -> tuple[Output | None, str | None]:
        """Return what is new, if anything, and the stop string that ended the choice, if one did."""
        record = self.record
        new = record.token_ids[self.read :]
        if not new and not record.done:
            return None, None
        delta = self.text.push(self._shown(new))
        text, stop = delta.text, delta.stop
        if stop is not None:
            new = new[: delta.num_tokens]
        elif record.done:
            rest = self.text.flush()
            text, stop = text + rest.text, rest.stop
            if (
                stop is None
                and record.params.include_stop_str_in_output
                and record.params.skip_special_tokens
            ):
                text += self._stop_tokens.get(record.stop_reason or -1, "")
        # A request that goes on has none of the tokens that it began with.
        lacking = len(record.token_ids) - len(record.logprobs)
        first, last = self.read - lacking, self.read + len(new) - lacking
        logprobs = record.logprobs[max(0, first) : max(0, last)]
        self.read += len(new)
        self.finished = stop is not None or record.done
        return self._output(text, new, logprobs, stop), stop

    def _stop_reason(self) -> int | str | None:
        """Return the token that ended it; as the text that the client asked for, if that is how it did."""
        reason = self.record.stop_reason
        return reason if reason is None else self._stop_tokens.get(reason, reason)

    def _shown(self, new: list[int]) -> list[int]:
        """Return the tokens that make text: the one that stops the sequence is not part of it."""
        params = self.record.params
        stopped = self.record.finish_reason == "stop" and not params.include_stop_str_in_output
        return new[:-1] if stopped and new else new

    def _output(self, text: str, new: list[int], logprobs: list[TokenLogprobs], stop: str | None) -> Output:
        record = self.record
        return Output(
            index=self.index,
            text=text,
            token_ids=new,
            logprobs=logprobs if record.params.logprobs is not None else None,
            finish_reason="stop" if stop is not None else record.finish_reason,
            stop_reason=stop if stop is not None else self._stop_reason(),
            num_prompt_tokens=len(record.prompt_token_ids),
            num_generated_tokens=self.read,
            num_cached_tokens=record.num_cached_tokens,
        )
