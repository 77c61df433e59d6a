"""HTTP/1.1 as Hypercorn serves it, closer to RFC 9112: versions, targets and framing that it leaves open."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import h11
import trio
from hypercorn.events import Closed, Event, Updated
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Response
from hypercorn.protocol.h11 import H11Protocol

from ullm.server.api.errors import HttpVersionRefused, error_body

_ABSOLUTE = re.compile(rb"https?://(?P<authority>[^/?#]*)(?P<rest>[^#]*)", re.IGNORECASE)
"""A target in absolute form (RFC 9112, 3.2.2), which clients send that take the server for a proxy."""


class _ConnectionEnded(Exception):
    """The connection has ended while its next request waited for the answer to the one before."""


class _Turn:
    """Lets a connection's next request wait for its turn; Hypercorn's event for that would have no end."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._has_ended = False

    async def clear(self) -> None:
        """Have requests wait."""
        self._event = trio.Event()

    async def set(self) -> None:
        """Let the next one go on."""
        self._event.set()

    def end(self) -> None:
        """Note the end of the connection."""
        self._has_ended = True
        self._event.set()

    async def wait(self) -> None:
        """Wait for the turn.

        Raises:
            _ConnectionEnded: it never comes.
        """
        if not self._has_ended:
            await self._event.wait()
        if self._has_ended:
            raise _ConnectionEnded


class Http1Protocol(H11Protocol):
    """One connection's HTTP/1.1 or 1.0. Requests to upgrade to HTTP/2 are ignored (RFC 9110, 7.8)."""

    can_read: Any
    connection: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.can_read = _Turn()
        self._ends_after_answer = False

    async def handle(self, event: Event) -> None:
        """Take what the client has sent, or the end of the connection."""
        if isinstance(event, Closed):
            self.can_read.end()
        with suppress(_ConnectionEnded):
            await super().handle(event)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send a part of an answer; the last one of a connection says so."""
        self._ends_after_answer |= self.context.terminated.is_set() and isinstance(event, Response)
        if isinstance(event, Response) and event.status_code >= 200 and self._ends_after_answer:
            event = Response(event.stream_id, [*event.headers, (b"connection", b"close")], event.status_code)
        await super().stream_send(event)

    # --- in place of Hypercorn's own methods ---------------------------------------------------------

    async def _check_protocol(self, event: h11.Request) -> None:
        """Note how to frame the answer. Hypercorn would change to HTTP/2 here."""
        self._ends_after_answer = _has_faulty_framing(event)

    async def _create_stream(self, request: h11.Request) -> None:
        if not request.http_version.startswith(b"1."):
            await self._refuse(HttpVersionRefused(request.http_version.decode()))
            return
        await super()._create_stream(_in_origin_form(_with_one_framing(request)))

    async def _maybe_recycle(self) -> None:
        """Go on to the next request, at a stop too, where the client has not been told of the end."""
        await self._close_stream()
        if self.connection.our_state is h11.DONE and self.connection.their_state is h11.DONE:
            self.connection.start_next_cycle()
            await self.can_read.set()
            await self.send(Updated(idle=True))
        else:
            await self.can_read.set()
            await self.send(Closed())

    async def _refuse(self, error: HttpVersionRefused) -> None:
        body = error_body(error)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(body)):
            await self._send_h11_event(event)
        await self._send_h11_event(h11.EndOfMessage())
        await self.send(Closed())


def _has_faulty_framing(request: h11.Request) -> bool:
    """Return True if others may see the end of the request elsewhere (RFC 9112, 6.1)."""
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return False
    return b"content-length" in names or request.http_version < b"1.1"


def _with_one_framing(request: h11.Request) -> h11.Request:
    """Return the request without the length that its transfer encoding overrides (RFC 9112, 6.3)."""
    if not _has_faulty_framing(request):
        return request
    return _changed(request, [pair for pair in request.headers if pair[0] != b"content-length"])


def _in_origin_form(request: h11.Request) -> h11.Request:
    """Return the request with a path as its target, and the target's host as its host (RFC 9112, 3.2.2)."""
    absolute = _ABSOLUTE.fullmatch(request.target)
    if absolute is None:
        return request
    headers = [(b"host", absolute["authority"]), *(pair for pair in request.headers if pair[0] != b"host")]
    rest = absolute["rest"]
    return _changed(request, headers, rest if rest.startswith(b"/") else b"/" + rest)


def _changed(
    request: h11.Request, headers: list[tuple[bytes, bytes]], target: bytes | None = None
) -> h11.Request:
    return h11.Request(
        method=request.method,
        headers=headers,
        target=request.target if target is None else target,
        http_version=request.http_version,
    )
