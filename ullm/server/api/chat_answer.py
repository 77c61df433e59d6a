"""Answers in the format of chat completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullm.server.api.answers import AnswerHead, ChunkEncoder, Scores
from ullm.server.api.logprobs import chat_logprobs, prompt_logprobs
from ullm.server.api.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
    Usage,
)
from ullm.server.api.types import TokenizerInterface

if TYPE_CHECKING:
    from ullm.engine.output import Output


class ChatAnswer:
    """The answer to one conversation; see `ullm.server.api.answers.AnswerFormat`.

    Args:
        n: number of choices.
        scores: returns the log probabilities of the prompt's tokens, if the client wants them.
        with_usage: the stream ends with the usage.
    """

    def __init__(
        self, head: AnswerHead, tokenizer: TokenizerInterface, n: int, scores: Scores, *, with_usage: bool
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._scores = scores
        self._encoder = ChunkEncoder(head.chunk_fields("chat.completion.chunk"), with_usage=with_usage)
        self._choices = [ChatChoice(index=index, message=ChatMessage(content="")) for index in range(n)]
        self._opened = False

    def events(self, prompt: int, output: Output) -> bytes:
        """Return an event per chunk; the first ones name the role of each choice."""
        return b"".join(map(self._encoder.choice, [*self._opening(), *self._chunks(output)]))

    def end(self, usage: Usage) -> bytes:
        """Return the last events of the stream."""
        return self._encoder.end(usage)

    def add(self, prompt: int, output: Output) -> None:
        """Add an output to the whole answer."""
        choice = self._choices[output.index]
        choice.message.content += output.text
        choice.finish_reason = output.finish_reason
        choice.stop_reason = output.stop_reason
        logprobs = self._logprobs(output)
        if choice.logprobs is None:
            choice.logprobs = logprobs
        elif logprobs is not None:
            choice.logprobs.content += logprobs.content

    def whole(self, usage: Usage) -> ChatCompletion:
        """Return the whole answer."""
        answer = ChatCompletion(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            choices=self._choices,
            usage=usage,
        )
        scores = self._scores(0)
        if scores is not None:
            answer.prompt_logprobs = prompt_logprobs(scores, self._tokenizer)
        return answer

    def _opening(self) -> list[ChatChunkChoice]:
        if self._opened:
            return []
        self._opened = True
        role = Delta(role="assistant", content="")
        return [ChatChunkChoice(index=choice.index, delta=role) for choice in self._choices]

    def _chunks(self, output: Output) -> list[ChatChunkChoice]:
        """Return what an output adds, and the end of its choice as a chunk of its own."""
        chunks = []
        logprobs = self._logprobs(output)
        if output.text or (logprobs is not None and logprobs.content):
            delta = Delta(content=output.text)
            chunks.append(ChatChunkChoice(index=output.index, delta=delta, logprobs=logprobs))
        if output.finish_reason is not None:
            end = ChatChunkChoice(index=output.index, delta=Delta(), finish_reason=output.finish_reason)
            end.stop_reason = output.stop_reason
            chunks.append(end)
        return chunks

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        return None if output.logprobs is None else chat_logprobs(output.logprobs, self._tokenizer)
