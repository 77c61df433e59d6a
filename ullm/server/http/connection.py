"""How one HTTP request meets ASGI: bodies within bounds, streams that start late, sends that finish.

Three things differ from Quart-Trio's own connection. A disconnect cancels the request, but not the send
that ends it. A response may be a `Push`, which writes when it has something, so that an error before the
first byte has its real status. And a body that nobody reads is taken off the wire, within bounds, before
the answer is sent, because closing a connection that still delivers would destroy the answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import trio
from quart import Response
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest, TrioResponse
from quart_trio.wrappers.request import TrioBody

from ullm.server.api.errors import as_request_error, error_body, error_headers

LINGER_SECONDS = 5.0
"""How long an unwanted body may take to arrive before the connection is closed on it."""
LINGER_BYTES = 256 << 20
"""How much of an unwanted body is thrown away before the connection is closed on it."""

CHUNKS = "ullm.chunks"
"""An extension in the scope of a request (ASGI 3, extensions): ``async (bytes) -> None``, which sends a piece
of a body whose length is not known, after the response's start and in place of ``http.response.body``. The
server may leave it out. It is for many small pieces, which cost half as much this way."""

Send = Callable[[Any], Awaitable[None]]


class BoundedBody(TrioBody):
    """A body that stops buffering at its limit, and knows when there is no more of it to come."""

    def __init__(self, expected_content_length: int | None, max_content_length: int | None) -> None:
        super().__init__(expected_content_length, max_content_length)
        self.finished = trio.Event()
        self._discarded = 0
        self._appending = False

    def append(self, data: bytes) -> None:
        """Take a piece; once the body is too large, throw pieces away."""
        if self._must_raise is not None:
            self._discarded += len(data)
            if self._discarded > LINGER_BYTES:
                self.finished.set()
            return
        self._appending = True
        super().append(data)
        self._appending = False
        if self._must_raise is not None:
            self.clear()

    def set_complete(self) -> None:
        """The client has sent everything, or, from within `append`, too much."""
        super().set_complete()
        if not self._appending:
            self.finished.set()


class BoundedRequest(TrioRequest):
    """A request with a `BoundedBody`."""

    body_class = BoundedBody


class Writer:
    """Sends pieces of a body; the status and the headers go with the first one.

    Args:
        send_chunk: see `CHUNKS`.
    """

    def __init__(
        self,
        send: Send,
        headers: list[tuple[bytes, bytes]],
        send_chunk: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> None:
        self._send = send
        self._headers = headers
        self._send_chunk = send_chunk or self._send_body
        self.started = False
        self.silent_since = trio.current_time()

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the status, and these headers beside the common ones."""
        own = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": [*self._headers, *own]})
        self.started = True

    async def write(self, data: bytes) -> None:
        """Send a piece of the body of a server-sent event stream."""
        if not self.started:
            await self.start(200, {"content-type": "text/event-stream", "cache-control": "no-cache"})
        await self._send_chunk(data)
        self.silent_since = trio.current_time()

    async def _send_body(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


class Push(TrioResponse):
    """A response that is produced while it is sent.

    Args:
        produce: writes the body. What it raises before the first write becomes an error response.
        on_error: bytes to write for what it raises later.
    """

    def __init__(
        self, produce: Callable[[Writer], Awaitable[None]], on_error: Callable[[BaseException], bytes]
    ) -> None:
        super().__init__(b"")
        self.produce = produce
        self.on_error = on_error
        self.timeout = None
        del self.headers["content-type"]
        self.headers.pop("content-length", None)


class Connection(TrioASGIHTTPConnection):
    """One HTTP request; see the module."""

    _request: Any = None

    async def __call__(self, receive: Any, send: Any) -> None:
        """Serve it."""

        async def shielding(message: Any) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                with trio.CancelScope(shield=True):
                    await send(message)
            else:
                await send(message)

        try:
            await super().__call__(receive, shielding)
        finally:
            self._request = None  # it refers to this: only a collection of garbage would free the two

    def _create_request_from_scope(self, send: Any) -> Any:
        if not self.scope["path"].startswith("/"):
            self.scope["path"] = "/" + self.scope["path"]  # as in "GET ?query"; Quart needs a path
        self._request = super()._create_request_from_scope(send)
        return self._request

    async def _send_response(self, send: Any, response: Any) -> None:
        with trio.move_on_after(LINGER_SECONDS):
            await cast(BoundedBody, self._request.body).finished.wait()
        if isinstance(response, Push):
            await self._push(send, response)
        else:
            self._count(response.status_code)
            await super()._send_response(send, response)

    async def _push(self, send: Send, response: Push) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in response.headers]
        extensions: Any = self.scope.get("extensions") or {}
        writer = Writer(send, headers, extensions.get(CHUNKS))
        try:
            await response.produce(writer)
            self._count(200)
        except (Exception, BaseExceptionGroup) as error:
            await self._push_error(writer, response, error)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _push_error(self, writer: Writer, response: Push, error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup) and error.subgroup(trio.Cancelled):
            raise error
        if writer.started:
            self._count(200)
            await writer.write(response.on_error(error))
            return
        told = as_request_error(error)
        self._count(told.status)
        await writer.start(told.status, {**error_headers(told), "content-type": "application/json"})
        await writer.write(error_body(told))

    def _count(self, status: int) -> None:
        rule = self._request.url_rule
        route = rule.rule if rule is not None else "other"
        count: Callable[[str, str, int], None] = self.app.extensions["ullm_count"]
        count(self._request.method if rule is not None else "other", route, status)


__all__ = ["BoundedRequest", "Connection", "Push", "Response", "Writer"]
