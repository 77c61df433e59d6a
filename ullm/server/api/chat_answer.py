"""Answers in the format of chat completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ullm.parsing.parts import Text
from ullm.parsing.tool_use import PLAIN, Reading
from ullm.server.api.answers import AnswerHead, AnswerStyle, ChunkEncoder, Scores
from ullm.server.api.chat_choice import ChoiceParts
from ullm.server.api.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from ullm.server.api.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
)

if TYPE_CHECKING:
    from ullm.engine.output import Output


class ChatAnswer:
    """The answer to one conversation; see `ullm.server.api.answers.AnswerFormat`.

    Args:
        names: of tokens, for log probabilities.
        n: number of choices.
        scores: returns the log probabilities of the prompt's tokens, if the client wants them.
        prompt: the prompt's tokens.
        begin: text before what is generated: the message that goes on.
        reading: how the choices' texts are read.
        call_ids: what the ids of calls derive from; by default each one is random.
        reasoning: whether reasoning is shown.
    """

    def __init__(
        self,
        head: AnswerHead,
        names: TokenNames,
        n: int,
        scores: Scores,
        style: AnswerStyle,
        *,
        prompt: list[int],
        begin: str = "",
        reading: Reading = PLAIN,
        call_ids: str = "",
        reasoning: bool = True,
    ) -> None:
        self._head = head
        self._names = names
        self._scores = scores
        self._style = style
        self._prompt = prompt
        self._begin = begin
        self._encoder = ChunkEncoder(head.chunk_fields("chat.completion.chunk"), with_usage=style.usage)
        self._choices = [ChatChoice(index=index, message=ChatMessage(content="")) for index in range(n)]
        self._parts = [
            ChoiceParts(
                reading.parser,
                legacy=reading.legacy,
                ids=call_ids and f"{call_ids} {index}",
                reasoning=reasoning,
            )
            for index in range(n)
        ]
        for parts in self._parts if begin else ():
            parts.add([Text(begin)])
        self._counts: dict[int, int] = {}
        self._opened = self._scored = False
        self._prompt_logprobs: PromptLogprobs | msgspec.UnsetType | None = msgspec.UNSET

    async def prepare(self, prompt: int, output: Output) -> None:
        """Put the scores of the prompt into shape, once."""
        scores = self._scores(0) if self._prompt_logprobs is msgspec.UNSET and output.index == 0 else None
        if scores is not None:
            self._prompt_logprobs = await prompt_logprobs(scores, self._names)

    def events(self, prompt: int, output: Output) -> bytes:
        """Return an event per chunk; the first ones name the role of each choice."""
        opening = [self._encoder.choice(choice, self._first_fields(i)) for i, choice in self._opening()]
        self._counts[output.index] = output.num_generated_tokens
        chunks = [self._encoder.choice(chunk, self._fields(output)) for chunk in self._chunks(output)]
        return b"".join((*opening, *chunks))

    def end(self, usage: Usage) -> bytes:
        """Return the last events of the stream."""
        return self._encoder.end(usage)

    def add(self, prompt: int, output: Output) -> None:
        """Add an output to the whole answer."""
        choice, parts = self._choices[output.index], self._parts[output.index]
        parts.add(parts.read(output))
        choice.finish_reason = self._style.reason(parts.finish_reason(output))
        choice.finish_cause = self._style.own_reason(output.finish_reason)
        choice.stop_reason = output.stop_reason
        if self._style.token_ids:
            known = choice.token_ids if isinstance(choice.token_ids, list) else []
            choice.token_ids = [*known, *output.token_ids]
        logprobs = self._logprobs(output)
        if choice.logprobs is None:
            choice.logprobs = logprobs
        elif logprobs is not None:
            choice.logprobs.content += logprobs.content

    def whole(self, usage: Usage) -> ChatCompletion:
        """Return the whole answer."""
        for choice, parts in zip(self._choices, self._parts, strict=True):
            choice.message = parts.message()
        return ChatCompletion(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            choices=self._choices,
            usage=usage,
            prompt_logprobs=self._prompt_logprobs,
            prompt_token_ids=self._prompt if self._style.token_ids else msgspec.UNSET,
        )

    def _opening(self) -> list[tuple[int, ChatChunkChoice]]:
        """Return a chunk per choice, which name its role; further ones have what the text begins with."""
        if self._opened:
            return []
        self._opened = True
        deltas = [Delta(role="assistant", content="")]
        if self._begin:
            deltas.append(Delta(content=self._begin))
        chunks = [
            ChatChunkChoice(index=each.index, delta=delta) for delta in deltas for each in self._choices
        ]
        return list(enumerate(chunks))

    def _first_fields(self, number: int) -> dict[str, Any]:
        """Return the fields of a chunk that only the stream's first one has, beside those of all."""
        first = {"prompt_token_ids": self._prompt} if self._style.token_ids and number == 0 else {}
        return {**first, **self._running_usage()}

    def _fields(self, output: Output) -> dict[str, Any]:
        """Return the fields of a chunk; the first one of choice 0 has the scores of the prompt."""
        fields = self._running_usage()
        if output.index == 0 and not self._scored:
            self._scored = True
            if self._prompt_logprobs is not msgspec.UNSET:
                fields["prompt_logprobs"] = self._prompt_logprobs
        return fields

    def _running_usage(self) -> dict[str, Any]:
        if not self._style.running_usage:
            return {}
        made = sum(self._counts.values())
        return {
            "usage": Usage(
                prompt_tokens=len(self._prompt),
                completion_tokens=made,
                total_tokens=len(self._prompt) + made,
                prompt_tokens_details=PromptTokensDetails(),
            )
        }

    def _chunks(self, output: Output) -> list[ChatChunkChoice]:
        """Return what an output adds, and the end of its choice as a chunk of its own."""
        parts = self._parts[output.index]
        deltas = list(parts.deltas(parts.read(output)))
        logprobs = self._logprobs(output)
        shown = self._style.token_ids and bool(output.token_ids)
        if not deltas and (shown or (logprobs is not None and logprobs.content)):
            deltas = [Delta(content="")]
        chunks = [ChatChunkChoice(index=output.index, delta=delta) for delta in deltas]
        if chunks:
            chunks[0].logprobs = logprobs
            if self._style.token_ids:
                chunks[0].token_ids = list(output.token_ids)
        if output.finish_reason is not None:
            end = ChatChunkChoice(
                index=output.index,
                delta=Delta(),
                finish_reason=self._style.reason(parts.finish_reason(output)),
            )
            end.finish_cause = self._style.own_reason(output.finish_reason)
            end.stop_reason = output.stop_reason
            chunks.append(end)
        return chunks

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        return None if output.logprobs is None else chat_logprobs(output.logprobs, self._names)
