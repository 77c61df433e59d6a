"""HTTP requests in Quart: bounded bodies, sends that finish, handlers that write their own streams.

Three things differ from Quart-Trio's own connection. A disconnect cancels the request, but not the send
that ends it. A handler may write its answer itself, on the request's `Wire`, and then return `sent`. And a
body that no handler reads is taken off the wire, within bounds, before the answer is sent, because closing
a connection that still delivers would destroy the answer.

This is the only module that depends on private names of Quart and Quart-Trio;
tests/server/test_private_names.py lists them.
"""

from __future__ import annotations

from typing import Any, cast

import trio
from quart import request
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest, TrioResponse
from quart_trio.wrappers.request import TrioBody

from ullm.server.http.sse import CHUNKS, Wire

LINGER_SECONDS = 5.0
"""Seconds for an unwanted body to arrive before the connection is closed."""
LINGER_BYTES = 256 << 20
"""Bytes of an unwanted body that are discarded before the connection is closed."""


class BoundedBody(TrioBody):
    """A body that stops buffering at its limit, and knows when all of it has arrived."""

    def __init__(self, expected_content_length: int | None, max_content_length: int | None) -> None:
        super().__init__(expected_content_length, max_content_length)
        self.finished = trio.Event()
        self._discarded = 0
        self._appending = False

    def append(self, data: bytes) -> None:
        """Buffer a piece; discard it once the body is too large."""
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
        """Note that the client has sent everything or, from within `append`, too much."""
        super().set_complete()
        if not self._appending:
            self.finished.set()


class BoundedRequest(TrioRequest):
    """A request with a `BoundedBody`, and the wire that its answer goes to."""

    body_class = BoundedBody
    wire: Wire


class SentResponse(TrioResponse):
    """The response of a handler that has written its answer itself."""


def current_wire() -> Wire:
    """Return the wire of the request that is being handled."""
    return cast(BoundedRequest, request).wire


def sent() -> SentResponse:
    """Return what a handler returns that has written its answer to `current_wire`."""
    return SentResponse(b"")


class QuartConnection(TrioASGIHTTPConnection):
    """One HTTP request; see the module's docstring."""

    _request: Any = None

    async def __call__(self, receive: Any, send: Any) -> None:
        """Serve the request."""

        async def send_shielded(message: Any) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                with trio.CancelScope(shield=True):
                    await send(message)
            else:
                await send(message)

        try:
            await super().__call__(receive, send_shielded)
        finally:
            self._request = None  # a reference cycle, which only the garbage collector would free

    def _create_request_from_scope(self, send: Any) -> Any:
        if not self.scope["path"].startswith("/"):
            self.scope["path"] = "/" + self.scope["path"]  # as in "GET ?query"; Quart needs a path
        self.app.config["MAX_CONTENT_LENGTH"] = self.app.config["BODY_LIMIT"]()  # the model may change
        self._request = super()._create_request_from_scope(send)
        extensions: Any = self.scope.get("extensions") or {}
        self._request.wire = Wire(send, extensions.get(CHUNKS))
        return self._request

    async def _send_response(self, send: Any, response: Any) -> None:
        if isinstance(response, SentResponse):
            return
        with trio.move_on_after(LINGER_SECONDS):
            await cast(BoundedBody, self._request.body).finished.wait()
        await super()._send_response(send, response)
