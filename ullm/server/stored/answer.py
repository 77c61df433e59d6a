"""One stored answer: what was asked, what came so far, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ullm.errors import RequestError
from ullm.parsing.parts import Part, Text
from ullm.parsing.tool_use import PLAIN
from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.server.api import requests, schemas
from ullm.server.api import response_objects as objects
from ullm.server.api.response_objects import ResponseObject
from ullm.server.api.response_requests import ResponsesRequest
from ullm.server.api.types import TokenizerInterface
from ullm.server.stored.parts import AnswerParts, ScoredPart
from ullm.server.stored.stored import Durability, Stored, size_of

if TYPE_CHECKING:
    from ullm.engine.output import Output

_STATUS: dict[str, objects.Status] = {"stop": "completed", "cancelled": "cancelled"}
_REASON = {"length": "max_output_tokens"}


class AnswerHead(msgspec.Struct, kw_only=True):
    """What it takes to make the answer, or to go on with it.

    Args:
        created: seconds since 1970.
        served: model, arithmetic and release; another one would go on with another text.
        model: its name.
        messages: the whole conversation, as the chat template takes it.
        params: with its seed.
        session: see `ullm.server.api.requests.header_session`.
    """

    id: str
    owner: str
    created: int
    served: str
    model: str
    request: ResponsesRequest
    messages: list[dict[str, Any]]
    prompt: list[int]
    params: SamplingParams
    session: str = ""


class AnswerEnd(msgspec.Struct, kw_only=True):
    """How an answer ended.

    Args:
        reason: ``stop``, ``length``, ``abort``, ``timeout``, ``cancelled`` or ``error``.
        text: all of it.
        cached_tokens: of the prompt, those that the prefix cache had.
    """

    reason: str
    text: str = ""
    cached_tokens: int = 0
    error: objects.ResponseFailure | None = None


class StoredAnswer(Stored[AnswerHead, AnswerEnd]):
    """An answer of ``/v1/responses`` that is being made, or has been made.

    Attributes:
        token_ids: the tokens so far.
        text: their text, as far as it is final.
        end_token_ids: tokens that end an answer and are no part of its text.
        reading: how the text is read.
        tokenizer: of the model that makes it; set with `reading`, before it is shown.
        scores: the log probabilities of the tokens, if they were asked for.

    Raises:
        ValueError: not each token has log probabilities.
    """

    tokenizer: TokenizerInterface

    def __init__(
        self,
        head: AnswerHead,
        token_ids: list[int] | None = None,
        end: AnswerEnd | None = None,
        scores: Sequence[TokenLogprobs] = (),
    ) -> None:
        super().__init__(head, end)
        self.token_ids = token_ids or []
        self.scores = list(scores)
        if self.scored and len(self.scores) != len(self.token_ids):
            raise ValueError("not each token has log probabilities")
        self._scores_size = sum(map(size_of, self.scores))
        self.text = "" if end is None else end.text
        self.reading = PLAIN
        self.end_token_ids: frozenset[int] = frozenset()
        self._cached_tokens = 0 if end is None else end.cached_tokens
        self._head_size = 8 * len(head.prompt) + 2 * len(str(head.messages)) + 4096

    @property
    def durability(self) -> Durability:
        """Whether it is written to a journal."""
        if self.head.request.store is False:
            return "never"
        return "always" if self.head.request.background else "with --journal"

    @property
    def log(self) -> list[int]:
        """Its tokens, in the form that the journal has; it only grows."""
        return self.token_ids

    @property
    def notes(self) -> list[TokenLogprobs]:
        """What else is known with its tokens; it only grows, and only with `log`."""
        return self.scores

    @property
    def size(self) -> int:
        """About the bytes that it takes in memory and in the journal."""
        return self._head_size + 8 * len(self.token_ids) + self._scores_size

    def take(self, output: Output, known: int) -> int:
        """Add an output.

        Args:
            known: tokens taken before in this run; a resumed answer's first outputs repeat what it has.

        Returns:
            How many tokens this run has taken.
        """
        self.text = self.text + output.text if known else output.text
        known += len(output.token_ids)
        new = known - len(self.token_ids)
        if new > 0:
            self.token_ids += output.token_ids[-new:]
            if output.logprobs is not None:
                self.scores += output.logprobs[-new:]
                self._scores_size += sum(map(size_of, output.logprobs[-new:]))
        self._cached_tokens = max(self._cached_tokens, output.num_cached_tokens)
        self.announce()
        return known

    @property
    def num_shown(self) -> int:
        """Tokens that make text: all but one that ended it."""
        ended = bool(self.token_ids) and self.token_ids[-1] in self.end_token_ids
        return len(self.token_ids) - ended

    def _end(self, reason: str, failure: RequestError | None) -> None:
        shown = None
        if failure is not None:
            shown = objects.ResponseFailure(failure.code or "server_error", str(failure))
        self.end = AnswerEnd(reason=reason, text=self.text, cached_tokens=self._cached_tokens, error=shown)

    def show(self) -> ResponseObject:
        """Return it as it is now."""
        head, request, end = self.head, self.head.request, self.end
        response = ResponseObject(
            id=head.id,
            created_at=head.created,
            status=self._status(),
            model=head.model,
            background=bool(request.background),
            output=self._output(),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            previous_response_id=request.previous_response_id,
            store=request.store is not False,
            temperature=head.params.temperature,
            text={"format": {"type": "text"}},
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            parallel_tool_calls=request.parallel_tool_calls is not False,
            top_logprobs=head.params.logprobs or 0,
            top_p=head.params.top_p,
        )
        if (reasoning := request.reasoning) is not None:
            response.reasoning = {"effort": reasoning.effort, "summary": reasoning.summary}
        if request.text is not None and request.text.format is not None:
            response.text = {"format": msgspec.to_builtins(request.text.format)}
        if end is not None:
            response.error = end.error
            response.usage = self._usage()
            if response.status == "incomplete":
                response.incomplete_details = objects.IncompleteDetails(_REASON.get(end.reason, end.reason))
        return response

    def _status(self) -> objects.Status:
        if self.end is None:
            return "in_progress" if self.token_ids or not self.head.request.background else "queued"
        return "failed" if self.end.error is not None else _STATUS.get(self.end.reason, "incomplete")

    def _output(self) -> list[objects.Item]:
        if self.end is None and not self.text:
            return []
        items = objects.ItemEvents(self.head.id)
        changes = [change for part, scores in self._parts() for change in items.take(part, scores)]
        if self.end is not None:
            changes += items.close("completed" if self.end.reason == "stop" else "incomplete")
        assert changes or not items.output, "each item comes with a change"
        return items.output

    def _parts(self) -> Iterator[ScoredPart]:
        if not self.scored:
            parser = self.reading.parser() if self.reading.parser is not None else None
            parts: list[Part] = [Text(self.text)] if parser is None else [*parser.push(self.text)]
            if parser is not None and self.end is not None:
                parts += parser.finish()
            yield from ((part, []) for part in parts)
            return
        scored = AnswerParts(self.head.prompt, self.head.params, self.reading, self.tokenizer)
        for token_id, score in zip(self.token_ids[: self.num_shown], self.scores, strict=False):
            yield from scored.push(token_id, score)
        if self.end is not None:
            yield from scored.finish()

    def _usage(self) -> objects.ResponseUsage:
        given, made = len(self.head.prompt), len(self.token_ids)
        return objects.ResponseUsage(
            input_tokens=given,
            input_tokens_details=objects.InputTokensDetails(self._cached_tokens),
            output_tokens=made,
            output_tokens_details=objects.OutputTokensDetails(self._reasoning_tokens()),
            total_tokens=given + made,
        )

    def _reasoning_tokens(self) -> int:
        if self.reading.parser is None:
            return 0
        parts = AnswerParts(self.head.prompt, self.head.params, self.reading, self.tokenizer)
        for token_id in self.token_ids:
            for _ in parts.push(token_id):
                pass
        return parts.reasoning_tokens

    def conversation(self) -> list[dict[str, Any]]:
        """Return the conversation with this answer, for one that goes on."""
        text, thought, calls = "", "", []
        for item in self._output():
            if isinstance(item, objects.OutputMessage):
                text += "".join(part.text for part in item.content)
            elif isinstance(item, objects.ReasoningItem):
                thought += "".join(part.text for part in item.content)
            else:
                function = schemas.CalledFunction(name=item.name, arguments=item.arguments)
                calls.append(schemas.ToolCall(id=item.call_id, function=function))
        turn = schemas.Message(
            role="assistant", content=text, reasoning_content=thought or None, tool_calls=calls or None
        )
        return [*self.head.messages, *requests.template_messages([turn])]
