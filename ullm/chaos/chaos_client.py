"""One request of a chaos run as its client sees it: every event is counted and checked."""

from __future__ import annotations

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


@dataclass(frozen=True)
class AnswerOutcome:
    """What must be the same with and without faults: text and finish reason of each choice, and the usage."""

    texts: tuple[str, ...]
    finishes: tuple[str, ...]
    completion_tokens: int | None


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
        watched: True if its client reads as fast as it can, so that the server causes each silence.
        last_event: time of the last event.
    """

    request: ChaosRequest
    started: float
    ended: float | None = None
    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, list[str]] = field(default_factory=dict)
    dones: int = 0
    completion_tokens: int | None = None
    status: int | None = None
    retry_after: str | None = None
    error: str | None = None
    gaps: list[tuple[float, float]] = field(default_factory=list)
    crashes: int = 0
    excused: str = ""
    watched: bool = True
    last_event: float = 0.0

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
        return AnswerOutcome(texts, finishes, self.completion_tokens)

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
        return violations or self._differences(name, expected)

    def _differences(self, name: str, expected: AnswerOutcome | None) -> list[str]:
        if expected is None or self.outcome == expected:
            return []
        violations = []
        for index, (text, wanted) in enumerate(zip(self.outcome.texts, expected.texts, strict=True)):
            if text != wanted and not (self.excused and wanted.startswith(text.rstrip("\ufffd"))):
                violations.append(f"{name}, choice {index}: {_difference(text, wanted)}")
        if self.outcome.finishes != expected.finishes and not self._aborted():
            violations.append(f"{name}: finish reasons {self.outcome.finishes}, not {expected.finishes}")
        if self.completion_tokens != expected.completion_tokens and not self.excused:
            violations.append(f"{name}: {self.completion_tokens} tokens, not {expected.completion_tokens}")
        return violations

    def _aborted(self) -> bool:
        reasons = {reason for each in self.finishes.values() for reason in each}
        return bool(self.excused) and reasons <= {"abort", "length", "stop"}


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
        answer.error = str(error)
    except msgspec.DecodeError as error:
        answer.error = f"not JSON: {error}"
    finally:
        await connection.aclose()
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
        _take_choice(choice, answer, (choice.get("delta") or {}).get("content") or choice.get("text") or "")


async def _read_whole(pieces: AsyncIterator[bytes], answer: ChaosAnswer) -> None:
    body = msgspec.json.decode(b"".join([piece async for piece in pieces]))
    _take_usage(body, answer)
    for choice in body["choices"]:
        _take_choice(choice, answer, (choice.get("message") or {}).get("content") or choice.get("text") or "")


def _take_choice(choice: dict[str, Any], answer: ChaosAnswer, text: str) -> None:
    index = choice["index"]
    if text and answer.finishes.get(index):
        answer.error = f"choice {index} goes on after its end"
    answer.texts[index] = answer.texts.get(index, "") + text
    if choice.get("finish_reason"):
        answer.finishes.setdefault(index, []).append(choice["finish_reason"])


def _take_usage(event: dict[str, Any], answer: ChaosAnswer) -> None:
    usage = event.get("usage")
    if usage:
        answer.completion_tokens = usage["completion_tokens"]


def _difference(text: str, wanted: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b), None)
    if place is None:
        return f"{len(text)} characters, not {len(wanted)}"
    return f"from character {place} on {text[place : place + 20]!r}, not {wanted[place : place + 20]!r}"
