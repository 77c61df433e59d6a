"""Calls of an app without a server; each piece of the answer has the virtual time at which it was sent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import trio
from quart_trio import QuartTrio


@dataclass
class Answer:
    """The messages that an app has sent.

    Args:
        pieces: of the body, with the trio time of each.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def events(self) -> list[str]:
        """The events of a stream."""
        return b"".join(piece for _, piece in self.pieces).decode().split("\n\n")[:-1]

    def json(self) -> Any:
        """The body of an answer that is not a stream."""
        return json.loads(b"".join(piece for _, piece in self.pieces))


async def call(app: QuartTrio, path: str, body: Any, host: str = "localhost", **others: Any) -> Answer:
    """POST ``body`` to an app and return its answer.

    Args:
        others: entries of the scope that differ from the usual ones.
    """
    content = json.dumps(body).encode()
    answer = Answer()
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Any:
        if not messages:
            await trio.sleep_forever()
        return messages.pop()

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["body"]:
            answer.pieces.append((trio.current_time(), message["body"]))

    headers = [(b"host", host.encode()), (b"content-type", b"application/json")]
    scope: Any = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*headers, (b"content-length", str(len(content)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "extensions": {},
        "asgi": {"version": "3.0"},
        **others,
    }
    await app(scope, receive, send)
    return answer
