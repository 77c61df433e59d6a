"""The requests of a long run: every way through the server, in random order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ullm.bench.workload import WORDS, Length
from ullm.client.completions import CompletionChunk, decode_chunk
from ullm.client.http import Connection
from ullm.errors import ServerRefused, UllmError

COMPLETIONS, CHAT = "/completions", "/chat/completions"
LEAVES_AFTER = 2
"""Number of events after which an impatient client disconnects."""
BEGINNINGS = 4
"""Number of different beginnings that some prompts share."""
BEGINNING_WORDS = 64
OK, REFUSED = 200, 400

How = Literal["answered", "left", "refused"]


@dataclass(frozen=True)
class SoakRequest:
    """One request.

    Args:
        leave_after: number of events after which the client disconnects; None: it stays.
        status: expected status; 400 for an invalid request, which must be refused.
    """

    kind: str
    path: str
    body: dict[str, Any]
    leave_after: int | None = None
    status: int = 200

    @property
    def choices(self) -> int:
        """Number of choices that the answer must have."""
        return int(self.body.get("n", 1))


@dataclass(frozen=True)
class Mix:
    """Draws requests; equal for equal seeds.

    Args:
        prompt_words, output_tokens: lengths, drawn uniformly.
    """

    model: str
    prompt_words: Length = Length(8, 64)
    output_tokens: Length = Length(8, 64)
    seed: int = 0

    def requests(self, client: int) -> Iterator[SoakRequest]:
        """Yield requests without end, different ones for each client."""
        source = random.Random(f"soak {self.seed} {client}")
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        while True:
            yield self._ask(source.choices(kinds, weights)[0], source)

    def _ask(self, kind: str, source: random.Random) -> SoakRequest:
        text = " ".join(source.choices(WORDS, k=self.prompt_words.draw(source)))
        path, options = _MANNER.get(kind, (COMPLETIONS, {}))
        if kind == "shared beginning":
            text = f"{self._beginning(source.randrange(BEGINNINGS))} {text}"
        body: dict[str, Any] = {"model": self.model, "temperature": 0, "stream": True, "ignore_eos": True}
        body["max_tokens"] = self.output_tokens.draw(source)
        body |= {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        if kind == "two choices":
            body["seed"] = source.randrange(1 << 31)
        leave = LEAVES_AFTER if kind == "leaves early" else None
        return SoakRequest(kind, path, body | options, leave, REFUSED if kind == "wrong" else 200)

    def _beginning(self, number: int) -> str:
        return " ".join(random.Random(f"beginning {self.seed} {number}").choices(WORDS, k=BEGINNING_WORDS))


WEIGHTS = {
    "completion, streamed": 4,
    "completion, whole": 2,
    "chat, streamed": 3,
    "shared beginning": 2,
    "two choices": 1,
    "log probabilities": 1,
    "stop string": 1,
    "leaves early": 1,
    "wrong": 1,
}
"""Kind of request → how often it is drawn, relative to others."""

_MANNER: dict[str, tuple[str, dict[str, Any]]] = {
    "completion, whole": (COMPLETIONS, {"stream": False}),
    "chat, streamed": (CHAT, {}),
    "two choices": (CHAT, {"n": 2, "temperature": 0.8, "top_p": 0.9}),
    "log probabilities": (COMPLETIONS, {"logprobs": 2}),
    "stop string": (COMPLETIONS, {"stop": [" the", "\n\n"]}),
    "wrong": (COMPLETIONS, {"max_tokens": -1}),
}


class Unexpected(UllmError):
    """A request did not end as it must."""

    def __init__(self, request: SoakRequest, why: str) -> None:
        super().__init__(f"{request.kind}: {why}")


async def run_request(connection: Connection, request: SoakRequest) -> How:
    """Run one request to its end, or until its client disconnects.

    Raises:
        Unexpected: it did not end as it must.
        ServerUnreachable: there is no server.
    """
    try:
        if not request.body["stream"]:
            answer = msgspec.convert(
                await connection.json("POST", f"/v1{request.path}", request.body), CompletionChunk
            )
            return _complete(request, sum(choice.finish_reason is not None for choice in answer.choices))
        return await _streamed(connection, request)
    except ServerRefused as refusal:
        if refusal.status != request.status or refusal.status == OK:
            raise Unexpected(request, str(refusal)) from None
        return "refused"


async def _streamed(connection: Connection, request: SoakRequest) -> How:
    ended = seen = 0
    async with connection.events(f"/v1{request.path}", request.body) as events:
        async for payload in events:
            chunk = decode_chunk(connection.endpoint, payload)
            ended += sum(choice.finish_reason is not None for choice in chunk.choices)
            seen += 1
            if seen == request.leave_after:
                return "left"
    return _complete(request, ended)


def _complete(request: SoakRequest, ended: int) -> How:
    if ended != request.choices or request.status != 200:
        raise Unexpected(request, f"{ended} of {request.choices} choices ended")
    return "answered"
