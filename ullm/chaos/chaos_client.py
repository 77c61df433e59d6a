"""One request of a chaos run as its client sees it: every event is counted and checked."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from ullm.chaos.catalogue import ChaosRequest
from ullm.client.http import DONE, Connection, Endpoint
from ullm.errors import ServerRefused, ServerUnreachable

LONGEST = 120.0
"""Seconds after which an unfinished answer counts as lost."""
SLOW_PIECES = 50
"""Number of pieces after each of which a slow reader pauses."""
NOTED_GAP = 0.05
"""Seconds of silence from which on a gap is recorded."""
CALL = "<call "
"""Begins a call of a tool in the text that is compared."""
SPECIAL = re.compile(r"<.*>")
"""A token that is no text, as ``<|im_end|>``."""
SAME_LOGPROB = 0.02
"""Difference of log probabilities that counts as none: in another batch sums are rounded otherwise."""


@dataclass(frozen=True)
class AnswerOutcome:
    """What must be the same with and without faults.

    Args:
        texts, finishes: of each choice.
        prompt_tokens, completion_tokens: the usage.
        logprobs: of each choice, as (token, log probability); empty for a request that has none.
    """

    texts: tuple[str, ...]
    finishes: tuple[str, ...]
    completion_tokens: int | None
    prompt_tokens: int | None = None
    logprobs: tuple[tuple[tuple[str, float], ...], ...] = ()


@dataclass
class ChaosAnswer:
    """Everything that came back for one request; times are seconds of trio's clock.

    Args:
        dones: number of ``[DONE]`` events.
        finishes: choice → every finish reason that came.
        status: status of a refusal; 200 for an error inside a stream.
        gaps: silences of at least `NOTED_GAP`, as (beginning, end).
        crashes: workers lost by faults while it was running.
        excused: why it may end early, with ``abort``; empty if it may not.
        logprobs: choice → (token, log probability) of each token.
        scored: choice of a chat → the bytes of its tokens, as its log probabilities have them.
        busiest: most choices that were in flight, its own included, while it was; see `World.send`.
        watched: True if its client reads as fast as it can, so that the server causes each silence.
        last_event: time of the last event.
        port: the client's end of the connection.
        broke: True if the connection ended before the answer did.
    """

    request: ChaosRequest
    started: float
    ended: float | None = None
    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, list[str]] = field(default_factory=dict)
    dones: int = 0
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    logprobs: dict[int, list[tuple[str, float]]] = field(default_factory=dict)
    scored: dict[int, bytes] = field(default_factory=dict)
    busiest: int = 0
    status: int | None = None
    retry_after: str | None = None
    error: str | None = None
    gaps: list[tuple[float, float]] = field(default_factory=list)
    crashes: int = 0
    excused: str = ""
    watched: bool = True
    last_event: float = 0.0
    port: int | None = None
    broke: bool = False

    def note_event(self, now: float) -> None:
        """Record an event of the stream; a long silence before it is a gap."""
        last, self.last_event = self.last_event or self.started, now
        if self.watched and now - last >= NOTED_GAP:
            self.gaps.append((last, now))

    @property
    def outcome(self) -> AnswerOutcome:
        """The part that can be compared with another run."""
        texts = tuple(self.texts.get(index, "") for index in range(self.request.choices))
        finishes = tuple(",".join(self.finishes.get(index, [])) for index in range(self.request.choices))
        scored = range(self.request.choices) if self.logprobs else ()
        logprobs = tuple(tuple(self.logprobs.get(index, ())) for index in scored)
        return AnswerOutcome(texts, finishes, self.completion_tokens, self.prompt_tokens, logprobs)

    def violations(self, expected: AnswerOutcome | None) -> list[str]:
        """Return what is wrong with an answer that its client waited for.

        Args:
            expected: outcome of an undisturbed run; None in that run itself.
        """
        form = "stream" if self.request.stream else "unary"
        name = f"request {self.request.number} ({self.request.path}, {form})"
        if self.error is not None:
            return [] if self.status == 429 and self.retry_after else [f"{name} failed: {self.error}"]
        violations = []
        if self.request.stream and self.dones != 1:
            violations.append(f"{name} said {self.dones} times that it was done")
        for index in range(self.request.choices):
            if len(self.finishes.get(index, [])) != 1:
                violations.append(f"{name}, choice {index}: finish reasons {self.finishes.get(index, [])}")
            scored = self.scored.get(index)
            if scored is not None and scored.decode("utf-8", "replace") != self.texts.get(index):
                violations.append(f"{name}, choice {index}: its log probabilities are those of another text")
        return violations or self._differences(name, expected)

    def _differences(self, name: str, expected: AnswerOutcome | None) -> list[str]:
        if expected is None or self.outcome == expected:
            return []
        violations = []
        for index, (text, wanted) in enumerate(zip(self.outcome.texts, expected.texts, strict=True)):
            if text != wanted and not (self.excused and _is_beginning(text, wanted)):
                violations.append(f"{name}, choice {index}: {_difference(text, wanted)}")
        if self.outcome.finishes != expected.finishes and not self._aborted():
            violations.append(f"{name}: finish reasons {self.outcome.finishes}, not {expected.finishes}")
        if self.completion_tokens != expected.completion_tokens and not self.excused:
            violations.append(f"{name}: {self.completion_tokens} tokens, not {expected.completion_tokens}")
        if self.prompt_tokens != expected.prompt_tokens:
            violations.append(f"{name}: {self.prompt_tokens} prompt tokens, not {expected.prompt_tokens}")
        return violations + self._unlike(name, expected)

    def _unlike(self, name: str, expected: AnswerOutcome) -> list[str]:
        """Return where the log probabilities differ, by more than the arithmetic of another batch."""
        violations = []
        for index, wanted in enumerate(expected.logprobs):
            found = self.logprobs.get(index, [])
            if len(found) != len(wanted) and not self.excused:
                violations.append(
                    f"{name}, choice {index}: {len(found)} log probabilities, not {len(wanted)}"
                )
            pairs = enumerate(zip(found, wanted, strict=False))
            place = next(
                (at for at, (a, b) in pairs if a[0] != b[0] or abs(a[1] - b[1]) > SAME_LOGPROB), None
            )
            if place is not None:
                violations.append(
                    f"{name}, choice {index}: log probability of token {place} is {found[place]}, "
                    f"not {wanted[place]}"
                )
        return violations

    def _aborted(self) -> bool:
        reasons = {reason for each in self.finishes.values() for reason in each}
        return bool(self.excused) and reasons <= {"abort", "length", "stop", "tool_calls"}


async def send_request(
    endpoint: Endpoint,
    answer: ChaosAnswer,
    *,
    slow: float = 0.0,
    stall_after: int | None = None,
    stall: float = 0.0,
    leave_after: int | None = None,
) -> None:
    """Send the request and record what comes back until the answer ends, in whatever way.

    Args:
        slow: seconds to wait after each of the first pieces.
        stall_after, stall: number of pieces after which nothing is read, and for how many seconds.
        leave_after: number of pieces after which to hang up.
    """
    answer.watched = not slow and not stall
    connection = Connection(endpoint, receive_buffer=None if answer.watched else 4096)
    try:
        with trio.fail_after(LONGEST):
            async with connection.request("POST", answer.request.path, answer.request.body) as pieces:
                async with aclosing(_paced(pieces, slow, stall_after, stall, leave_after)) as paced:
                    await (_read_stream if answer.request.stream else _read_whole)(paced, answer)
    except trio.TooSlowError:
        answer.error = f"no end within {LONGEST:g} s"
    except ServerRefused as refusal:
        answer.error, answer.status = str(refusal), refusal.status
        answer.retry_after = connection.headers.get("retry-after")
    except ServerUnreachable as error:
        answer.error, answer.broke = str(error), True
    except msgspec.DecodeError as error:
        answer.error = f"not JSON: {error}"
    finally:
        await connection.aclose()
        answer.port = connection.local_port
        answer.ended = trio.current_time()


async def _paced(
    pieces: AsyncIterable[bytes], slow: float, stall_after: int | None, stall: float, leave_after: int | None
) -> AsyncGenerator[bytes, None]:
    count = 0
    async for piece in pieces:
        yield piece
        count += 1
        if count == leave_after:
            return
        if slow and count < SLOW_PIECES:
            await trio.sleep(slow)
        if count == stall_after:
            await trio.sleep(stall)


async def _read_stream(pieces: AsyncIterator[bytes], answer: ChaosAnswer) -> None:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                _take_event(line[5:].strip(), answer)


def _take_event(payload: bytes, answer: ChaosAnswer) -> None:
    if payload == DONE:
        answer.dones += 1
        return
    answer.note_event(trio.current_time())
    event = msgspec.json.decode(payload)
    if event.get("error") is not None:
        answer.error, answer.status = f"an error in the stream: {event['error']}", 200
        return
    _take_usage(event, answer)
    for choice in event["choices"]:
        _take_choice(choice, answer, _text(choice, "delta"))


async def _read_whole(pieces: AsyncIterator[bytes], answer: ChaosAnswer) -> None:
    body = msgspec.json.decode(b"".join([piece async for piece in pieces]))
    _take_usage(body, answer)
    for choice in body["choices"]:
        _take_choice(choice, answer, _text(choice, "message"))


def _text(choice: dict[str, Any], field_name: str) -> str:
    """Return the text of a choice or of a piece of it; calls of tools count as text, without their ids."""
    turn = choice.get(field_name) or {}
    text: str = turn.get("content") or choice.get("text") or ""
    for call in turn.get("tool_calls") or ():
        function = call["function"]
        text += f"{CALL}{function['name']}>" if function.get("name") else ""
        text += function.get("arguments") or ""
    return text


def _take_choice(choice: dict[str, Any], answer: ChaosAnswer, text: str) -> None:
    index = choice["index"]
    if text and answer.finishes.get(index):
        answer.error = f"choice {index} goes on after its end"
    answer.texts[index] = answer.texts.get(index, "") + text
    if choice.get("logprobs"):
        answer.logprobs.setdefault(index, []).extend(_logprobs(choice["logprobs"]))
        _take_bytes(choice["logprobs"].get("content"), index, answer)
    if choice.get("finish_reason"):
        answer.finishes.setdefault(index, []).append(choice["finish_reason"])


def _take_usage(event: dict[str, Any], answer: ChaosAnswer) -> None:
    usage = event.get("usage")
    if usage:
        answer.completion_tokens = usage["completion_tokens"]
        answer.prompt_tokens = usage.get("prompt_tokens")


def _logprobs(logprobs: dict[str, Any]) -> list[tuple[str, float]]:
    """Return token and log probability of each token, of a chat or of a completion."""
    if logprobs.get("content") is not None:
        return [(token["token"], token["logprob"]) for token in logprobs["content"]]
    pairs = zip(logprobs.get("tokens") or (), logprobs.get("token_logprobs") or (), strict=True)
    return [(token, logprob) for token, logprob in pairs]


def _take_bytes(content: list[dict[str, Any]] | None, index: int, answer: ChaosAnswer) -> None:
    """Keep the tokens of a chat, which make up its text, but for special ones."""
    for token in content or ():
        if not SPECIAL.fullmatch(token["token"]):
            answer.scored[index] = answer.scored.get(index, b"") + bytes(token["bytes"] or ())


def _is_beginning(text: str, wanted: str) -> bool:
    """Return whether a text is the beginning of another one, as far as it can be compared.

    Of a call that was cut before its name is complete there is what the model has written, which is another
    text than that of the call.
    """
    text = text.rstrip("\ufffd")
    if wanted.startswith(text):
        return True
    same = next(i for i, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b)
    call = wanted.rfind(CALL, 0, same + len(CALL))
    return call >= 0 and CALL not in text[call:]


def _difference(text: str, wanted: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b), None)
    if place is None:
        return f"{len(text)} characters, not {len(wanted)}"
    return f"from character {place} on {text[place : place + 20]!r}, not {wanted[place : place + 20]!r}"
