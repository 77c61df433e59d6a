"""Calls of an app within the process, without a socket: ASGI's messages, as a server would send them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import trio
from quart_trio import QuartTrio


@dataclass
class AppAnswer:
    """What an app has answered.

    Args:
        headers: with names in lower case.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


async def post(app: QuartTrio, path: str, body: bytes, headers: Mapping[str, str] = {}) -> AppAnswer:
    """POST JSON to an app and return its whole answer."""
    answer, sent = AppAnswer(), False
    all_headers = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": str(len(body)),
        **headers,
    }

    async def receive() -> Any:
        nonlocal sent
        if sent:
            await trio.sleep_forever()  # the client stays
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    scope: Any = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in all_headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 1),
        "extensions": {},
        "asgi": {"version": "3.0"},
    }
    await app(scope, receive, send)
    return answer
