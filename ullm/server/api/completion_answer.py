"""Answers in the format of completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ullm.server.api.answers import AnswerHead, AnswerStyle, ChunkEncoder, Scores
from ullm.server.api.logprobs import (
    Offsets,
    TokenIdNames,
    TokenNames,
    completion_logprobs,
    extend,
    prompt_logprobs,
    scored_prompt,
)
from ullm.server.api.responses import (
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
    PromptTokensDetails,
    TextCompletion,
    Usage,
)
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
        only_echo: the client wants no new tokens, only the prompts and their scores.
    """

    def __init__(
        self,
        head: AnswerHead,
        request: CompletionRequest,
        prompts: list[Prompt],
        tokenizer: TokenizerInterface,
        scores: Scores,
        style: AnswerStyle,
        *,
        only_echo: bool = False,
    ) -> None:
        self._head = head
        self._request = request
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._scores = scores
        self._style = style
        self._names: TokenNames = TokenIdNames(tokenizer) if request.return_tokens_as_token_ids else tokenizer
        self._encoder = ChunkEncoder(head.chunk_fields("text_completion"), with_usage=style.usage)
        self._counts: dict[int, int] = {}
        self._n = 1 if request.n is None else request.n
        self._skip_special_tokens = request.skip_special_tokens is not False
        self._only_echo = only_echo
        self._opened: set[int] = set()
        self._offsets: dict[int, Offsets] = {}
        self._choices: dict[int, CompletionChoice] = {}
        self._prompt_logprobs: dict[int, PromptLogprobs | None] = {}
        self._echo_logprobs: dict[int, CompletionLogprobs] = {}
        self._echoes: dict[int, str] = {}

    async def prepare(self, prompt: int, output: Output) -> None:
        """Put the scores of a prompt into shape, once: its first choice brings them, and only this one."""
        if output.index != 0 or prompt * self._n in self._opened:
            return
        request, scores = self._request, self._scores(prompt)
        if request.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = await prompt_logprobs(scores, self._tokenizer)
        if request.echo and request.logprobs is not None and scores is not None:
            asked = self._prompts[prompt]
            offsets = Offsets(self._tokenizer, skip_special_tokens=asked.text is not None)
            self._echo_logprobs[prompt] = await scored_prompt(asked.token_ids, scores, self._names, offsets)

    def events(self, prompt: int, output: Output) -> bytes:
        """Return an event, unless there is nothing to say yet."""
        delta = self._delta(prompt, output)
        self._counts[delta.index] = output.num_generated_tokens
        has_scores = delta.logprobs is not None or isinstance(delta.prompt_logprobs, list)
        if not (delta.text or delta.finish_reason or has_scores or delta.token_ids):
            return b""
        return self._encoder.choice(delta, {"usage": self._usage()} if self._style.running_usage else None)

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

    def _usage(self) -> Usage:
        """Return the usage so far."""
        prompt = sum(len(each.token_ids) for each in self._prompts)
        made = sum(self._counts.values())
        details = PromptTokensDetails()
        usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=made,
            total_tokens=prompt + made,
            prompt_tokens_details=details,
        )
        return self._billed(usage)

    def _billed(self, usage: Usage) -> Usage:
        """Leave out the token that was only generated because a prompt cannot be scored without one."""
        if self._only_echo:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _delta(self, prompt: int, output: Output) -> CompletionChoice:
        """Return what an output adds; the first one of a choice brings the prompt's echo and scores."""
        number = prompt * self._n + output.index
        delta = CompletionChoice(index=number, text="" if self._only_echo else output.text)
        delta.finish_reason = self._style.reason(output.finish_reason)
        delta.finish_cause = self._style.own_reason(output.finish_reason)
        delta.stop_reason = output.stop_reason
        if self._style.token_ids:
            delta.token_ids = [] if self._only_echo else list(output.token_ids)
        if self._only_echo and output.finish_reason == "stop":
            delta.finish_reason, delta.stop_reason = "length", None
        if output.logprobs is not None and not self._only_echo:
            offsets = self._offsets_of(number, prompt)
            delta.logprobs = completion_logprobs(output.token_ids, output.logprobs, self._names, offsets)
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
        text = self._prompts[index].text
        if text is None:
            text = self._echoes.get(index)
        if text is None:
            token_ids = self._prompts[index].token_ids
            text = self._echoes[index] = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _add_prompt(self, delta: CompletionChoice, index: int) -> None:
        if self._request.prompt_logprobs is not None:
            delta.prompt_logprobs = self._prompt_logprobs.pop(index, None)
        if self._style.token_ids:
            delta.prompt_token_ids = list(self._prompts[index].token_ids)
        if not self._request.echo:
            return
        delta.text = self._echo(index) + delta.text
        logprobs = self._echo_logprobs.pop(index, None)
        if logprobs is not None:
            if delta.logprobs is not None:
                extend(logprobs, delta.logprobs)
            delta.logprobs = logprobs


def _grow(choice: CompletionChoice, delta: CompletionChoice) -> None:
    if choice is delta:
        return
    choice.text += delta.text
    choice.finish_reason = delta.finish_reason
    choice.finish_cause = delta.finish_cause
    choice.stop_reason = delta.stop_reason
    if isinstance(choice.token_ids, list) and isinstance(delta.token_ids, list):
        choice.token_ids += delta.token_ids
    if delta.logprobs is not None:
        if choice.logprobs is None:
            choice.logprobs = delta.logprobs
        else:
            extend(choice.logprobs, delta.logprobs)
