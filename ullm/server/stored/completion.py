"""One stored chat, completion or message: what was asked, and the tokens of its choices so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from ullm.engine.replay import ChoiceEnd
from ullm.errors import RequestError
from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.server.api.answers import DONE, AnswerStyle
from ullm.server.api.errors import error_body
from ullm.server.api.message_errors import message_error_body, message_status
from ullm.server.api.message_requests import MessagesRequest
from ullm.server.api.responses import PromptTokensDetails, Usage
from ullm.server.api.schemas import ChatCompletionRequest, CompletionRequest
from ullm.server.stored.stored import Durability, Stored, size_of

if TYPE_CHECKING:
    from ullm.engine.output import Output


CompletionLike = ChatCompletionRequest | CompletionRequest | MessagesRequest


class PromptScores(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The log probabilities of a prompt's tokens."""

    prompt: int
    scores: list[TokenLogprobs | None]


class CachedTokens(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How many tokens of a prompt the prefix cache had, as the first output of its choices says."""

    prompt: int
    tokens: int


Note = TokenLogprobs | PromptScores | CachedTokens
"""What is known beside the tokens; the log probabilities are in the order of the tokens."""


class CompletionHead(msgspec.Struct, kw_only=True):
    """What it takes to make a chat, a completion or a message, or to go on with it.

    Args:
        model: its name.
        client: see `ullm.server.access`.
        chat, completion, message: what was asked; one of them.
        prompts: as tokens; one for a chat or a message.
        texts: the prompts of a completion that came as texts.
        params: with its seed.
        limit_field: the field that the client put the limit of tokens in, for errors.
        session: see `ullm.server.api.requests.header_session`.
    """

    id: str
    owner: str
    created: int
    served: str
    model: str
    client: str
    chat: ChatCompletionRequest | None = None
    completion: CompletionRequest | None = None
    message: MessagesRequest | None = None
    prompts: list[list[int]]
    texts: list[str | None] = []
    params: SamplingParams
    style: AnswerStyle
    limit_field: str
    session: str = ""

    @property
    def request(self) -> CompletionLike:
        """What was asked."""
        asked = self.chat or self.completion or self.message
        assert asked is not None, "one of them is given"
        return asked

    def failure(self, error: RequestError) -> StoredFailure:
        """Return an error in the form of the route."""
        if self.message is None:
            return StoredFailure(status=error.status, body=error_body(error))
        return StoredFailure(status=message_status(error.status), body=message_error_body(error))

    def last_events(self, failure: StoredFailure) -> bytes:
        """Return the events that end a stream with an error."""
        event = b"" if self.message is None else b"event: error\n"
        return event + b"data: " + failure.body + b"\n\n" + (DONE if self.message is None else b"")


class StoredFailure(msgspec.Struct, kw_only=True):
    """The error that an answer ended with: its status, and its body as JSON."""

    status: int
    body: bytes


class CompletionEnd(msgspec.Struct, kw_only=True):
    """How an answer ended.

    Args:
        choices: how each of them did; None: it had not when the answer failed.
    """

    choices: list[ChoiceEnd | None]
    failure: StoredFailure | None = None


class StoredCompletion(Stored[CompletionHead, CompletionEnd]):
    """A chat, a completion or a message that is being made, or has been made.

    Choices are numbered over all prompts, as in OpenAI's API.

    Args:
        log: tokens of an earlier run; with several choices each one behind the number of its choice.
        notes: of an earlier run.

    Attributes:
        tokens: of each choice, so far.
        scores: the log probabilities of each choice's tokens, if they were asked for.
        prompt_scores: number of a prompt → the log probabilities of its tokens, if they were asked for.
        cached: number of a prompt → its tokens that the prefix cache had.
        ends: how each choice ended.
        end: None until all have, or it has failed.
        arrived: trio time from which its timeout counts; None: when it goes on.
        resumed: an earlier run began it.
        admitted: the engine has taken it, so that its events can be sent.
    """

    def __init__(
        self,
        head: CompletionHead,
        log: list[int] | None = None,
        end: CompletionEnd | None = None,
        notes: Sequence[Note] = (),
    ) -> None:
        super().__init__(head, end)
        self.num_choices = len(head.prompts) * head.params.n
        self.tokens: list[list[int]] = [[] for _ in range(self.num_choices)]
        self.ends: list[ChoiceEnd | None] = [None] * self.num_choices if end is None else end.choices
        self.arrived: float | None = None
        self.resumed = self.admitted = log is not None
        self.scores: list[list[TokenLogprobs]] = [[] for _ in range(self.num_choices)]
        self.prompt_scores: dict[int, list[TokenLogprobs | None]] = {}
        self.cached: dict[int, int] = {}
        self._log = log or []
        self._notes: list[Note] = []
        self._notes_size = 0
        self._place(notes)
        self._known = [0] * self.num_choices
        self._confirmed = [not self.resumed] * self.num_choices
        request_size = len(msgspec.msgpack.encode(head.request))
        self._head_size = 8 * sum(map(len, head.prompts)) + 2 * request_size + 4096

    def _place(self, notes: Sequence[Note]) -> None:
        """Give each choice its tokens in the log, and their log probabilities."""
        choices, tokens = [0] * len(self._log), self._log
        if self.num_choices > 1:
            choices, tokens = self._log[::2], self._log[1::2]
        if len(choices) != len(tokens) or not all(0 <= choice < self.num_choices for choice in choices):
            raise ValueError("its tokens are those of another number of choices")
        for choice, token in zip(choices, tokens, strict=True):
            self.tokens[choice].append(token)
        for note in notes:
            self._know(note)
        scores = [note for note in notes if isinstance(note, TokenLogprobs)]
        if self.scored:
            for choice, score in zip(choices, scores, strict=True):
                self.scores[choice].append(score)

    @property
    def durability(self) -> Durability:
        """Whether it is written to a journal."""
        return "with --journal"

    @property
    def log(self) -> list[int]:
        """Its tokens, in the form that the journal has; it only grows."""
        return self._log

    @property
    def notes(self) -> list[Note]:
        """What else is known with its tokens; it only grows, and only with `log`."""
        return self._notes

    @property
    def size(self) -> int:
        """About the bytes that it takes in memory and in the journal."""
        return self._head_size + 8 * len(self._log) + self._notes_size

    def admit(self) -> None:
        """Note that the engine has taken it."""
        self.admitted = True
        self.announce()

    def take(
        self, choice: int, output: Output, prompt_scores: Sequence[TokenLogprobs | None] | None = None
    ) -> None:
        """Add an output of a choice. A resumed choice's first outputs repeat what it has.

        Args:
            prompt_scores: the log probabilities of its prompt's tokens, if they were asked for.
        """
        self._known[choice] += len(output.token_ids)
        self._confirmed[choice] = True
        new = self._known[choice] - len(self.tokens[choice])
        if new > 0:
            added = output.token_ids[-new:]
            self.tokens[choice] += added
            self._log += added if self.num_choices == 1 else [x for token in added for x in (choice, token)]
            if output.logprobs is not None:
                self.scores[choice] += output.logprobs[-new:]
                for score in output.logprobs[-new:]:
                    self._know(score)
            self._know_prompt(choice, output, prompt_scores)
        if output.finish_reason not in (None, "abort"):  # what is aborted may go on after the next start
            self.ends[choice] = ChoiceEnd(output.finish_reason, output.stop_reason, bool(output.token_ids))
        self.announce()

    def _know_prompt(
        self, choice: int, output: Output, scores: Sequence[TokenLogprobs | None] | None
    ) -> None:
        """Note what the first outputs of a prompt's choices bring."""
        prompt, index = divmod(choice, self.head.params.n)
        if prompt not in self.cached:
            self._know(CachedTokens(prompt, output.num_cached_tokens))
        if scores is not None and index == 0 and prompt not in self.prompt_scores:
            self._know(PromptScores(prompt, list(scores)))

    def _know(self, note: Note) -> None:
        self._notes.append(note)
        if isinstance(note, CachedTokens):
            self.cached[note.prompt] = note.tokens
        elif isinstance(note, PromptScores):
            self.prompt_scores[note.prompt] = note.scores
            self._notes_size += sum(map(size_of, note.scores))
        else:
            self._notes_size += size_of(note)

    def num_readable(self, choice: int) -> int:
        """Return how many tokens of a choice are known not to be the last, or to be it.

        A token that an earlier run has left may have ended the choice, which this run will find out.
        """
        known = len(self.tokens[choice])
        return known if self._confirmed[choice] or self.ended else max(0, known - 1)

    def _end(self, reason: str, failure: RequestError | None) -> None:
        if failure is None:  # what has not ended was given up
            self.ends = [each or ChoiceEnd("abort", None, with_token=False) for each in self.ends]
        self.end = CompletionEnd(choices=self.ends)
        if failure is not None:
            self.end.failure = self.head.failure(failure)

    def usage(self) -> Usage:
        """Return the tokens so far; a prompt counts once, whatever ``n`` is."""
        given, made = sum(map(len, self.head.prompts)), sum(map(len, self.tokens))
        return Usage(
            prompt_tokens=given,
            completion_tokens=made,
            total_tokens=given + made,
            prompt_tokens_details=PromptTokensDetails(sum(self.cached.values())),
        )
