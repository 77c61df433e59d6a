"""Answers in the format of completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ullm.server.api.answers import AnswerHead, ChunkEncoder, Scores
from ullm.server.api.logprobs import Offsets, completion_logprobs, extend, prompt_logprobs
from ullm.server.api.responses import CompletionChoice, TextCompletion, Usage
from ullm.server.api.schemas import CompletionRequest
from ullm.server.api.types import TokenizerInterface

if TYPE_CHECKING:
    from ullm.engine.output import Output


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens.

    Args:
        text: None if the client sent token ids.
    """

    token_ids: list[int]
    text: str | None = None


class CompletionAnswer:
    """The answer to one request of one or several prompts; see `ullm.server.api.answers.AnswerFormat`.

    Args:
        scores: returns the log probabilities of a prompt's tokens, if the client wants them.
    """

    def __init__(
        self,
        head: AnswerHead,
        request: CompletionRequest,
        prompts: list[Prompt],
        tokenizer: TokenizerInterface,
        scores: Scores,
    ) -> None:
        self._head = head
        self._request = request
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._scores = scores
        self._encoder = ChunkEncoder(head.chunk_fields("text_completion"), with_usage=request.wants_usage)
        self._n = 1 if request.n is None else request.n
        self._skip_special_tokens = request.skip_special_tokens is not False
        self._only_echo = bool(request.echo) and request.max_tokens == 0
        self._opened: set[int] = set()
        self._offsets: dict[int, Offsets] = {}
        self._choices: dict[int, CompletionChoice] = {}

    def events(self, prompt: int, output: Output) -> bytes:
        """Return an event, unless there is nothing to say yet."""
        delta = self._delta(prompt, output)
        if not delta.text and delta.finish_reason is None and delta.logprobs is None:
            return b""
        return self._encoder.choice(delta)

    def end(self, usage: Usage) -> bytes:
        """Return the last events of the stream."""
        return self._encoder.end(self._billed(usage))

    def add(self, prompt: int, output: Output) -> None:
        """Add an output to the whole answer."""
        delta = self._delta(prompt, output)
        _grow(self._choices.setdefault(delta.index, delta), delta)

    def whole(self, usage: Usage) -> TextCompletion:
        """Return the whole answer."""
        return TextCompletion(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            choices=[self._choices[index] for index in sorted(self._choices)],
            usage=self._billed(usage),
        )

    def _billed(self, usage: Usage) -> Usage:
        """Leave out the token that was only generated because a prompt cannot be scored without one."""
        if self._only_echo:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _delta(self, prompt: int, output: Output) -> CompletionChoice:
        """Return what an output adds; the first one of a choice brings the prompt's echo and scores."""
        number = prompt * self._n + output.index
        delta = CompletionChoice(index=number, text="" if self._only_echo else output.text)
        delta.finish_reason = output.finish_reason
        delta.stop_reason = output.stop_reason
        if self._only_echo and output.finish_reason == "stop":
            delta.finish_reason, delta.stop_reason = "length", None
        if output.logprobs is not None and not self._only_echo:
            offsets = self._offsets_of(number, prompt)
            delta.logprobs = completion_logprobs(output.token_ids, output.logprobs, self._tokenizer, offsets)
        if number not in self._opened:
            self._opened.add(number)
            self._add_prompt(delta, prompt)
        return delta

    def _offsets_of(self, number: int, index: int) -> Offsets:
        """Return the offsets of a choice, in the text that it is part of."""
        offsets = self._offsets.get(number)
        if offsets is None:
            offsets = self._offsets[number] = Offsets(
                self._tokenizer,
                len(self._echo(index)) if self._request.echo else 0,
                prompt_token_ids=self._prompts[index].token_ids,
                skip_special_tokens=self._skip_special_tokens,
            )
        return offsets

    def _echo(self, index: int) -> str:
        """Return the text of a prompt, as ``echo`` repeats it."""
        prompt = self._prompts[index]
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False)

    def _add_prompt(self, delta: CompletionChoice, index: int) -> None:
        request, scores = self._request, self._scores(index)
        if request.prompt_logprobs is not None:
            delta.prompt_logprobs = prompt_logprobs(scores, self._tokenizer)
        if not request.echo:
            return
        delta.text = self._echo(index) + delta.text
        if request.logprobs is not None and scores is not None:
            prompt = self._prompts[index]
            offsets = Offsets(self._tokenizer, skip_special_tokens=prompt.text is not None)
            logprobs = completion_logprobs(prompt.token_ids, scores, self._tokenizer, offsets)
            if delta.logprobs is not None:
                extend(logprobs, delta.logprobs)
            delta.logprobs = logprobs


def _grow(choice: CompletionChoice, delta: CompletionChoice) -> None:
    if choice is delta:
        return
    choice.text += delta.text
    choice.finish_reason = delta.finish_reason
    choice.stop_reason = delta.stop_reason
    if delta.logprobs is not None:
        if choice.logprobs is None:
            choice.logprobs = delta.logprobs
        else:
            extend(choice.logprobs, delta.logprobs)
