"""Faults between the server and its clients: refusals, slow first bytes, streams that break off.

Only requests to the API meet them; probes and admin endpoints tell the truth meanwhile. While nothing is
armed, this costs one comparison per request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ullm.errors import FaultInjected, QueueFull, RequestError
from ullm.server.api.answers import error_event
from ullm.server.api.errors import error_body, error_headers
from ullm.server.api.types import FaultsInterface, FiringInterface
from ullm.server.http.sse import CHUNKS

CUT = "ullm.cut"
"""An extension in the scope of a request: ``() -> None`` closes its connection with a reset. Optional for the
server; where it is missing, the application fails instead, upon which servers close the connection."""

BODY_SECONDS = 5.0
"""Seconds within which the body of a request that is refused has arrived."""

DEFAULT_STATUS = 503
"""Status of a refusal that names none."""

ASGI = Callable[[Any, Any, Any], Awaitable[None]]


class FaultyHttp:
    """Wraps an ASGI application.

    Args:
        concerns: returns whether a path is one of the API's.
    """

    def __init__(self, app: ASGI, faults: FaultsInterface, concerns: Callable[[str], bool]) -> None:
        self._app = app
        self._faults = faults
        self._concerns = concerns

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request."""
        if scope["type"] == "http" and self._faults.watching and self._concerns(scope["path"]):
            await _Exchange(self._app, self._faults, scope, receive, send).run()
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """One request while faults may happen."""

    def __init__(self, app: ASGI, faults: FaultsInterface, scope: Any, receive: Any, send: Any) -> None:
        self._app = app
        self._faults = faults
        extensions = dict(scope.get("extensions") or {})
        extensions.pop(CHUNKS, None)  # so that every piece comes by here
        self._scope = {**scope, "extensions": extensions}
        self._cut: Callable[[], None] | None = extensions.get(CUT)
        self._receive, self._send = receive, send
        names = {name: value for name, value in scope["headers"]}
        self._request = names.get(b"x-request-id", b"").decode("latin-1")
        self._is_stream = self._is_over = False
        self._pieces = 0
        self._running = trio.CancelScope()

    async def run(self) -> None:
        """Serve it, as far as the faults let it be served."""
        for firing in self._faults.hits("http.request", request=self._request):
            if firing.action == "slow":
                firing.note(f"waits {firing.fault.duration:g} s")
                await trio.sleep(firing.fault.duration)
            elif firing.action == "refuse":
                return await self._refuse(firing)
            else:
                return self._reset(firing)
        with self._running:
            await self._app(self._scope, self._receive, self._send_or_fail)

    async def _refuse(self, firing: FiringInterface) -> None:
        error = _error(f"refuse at {firing.fault.point}", firing.fault.status or DEFAULT_STATUS)
        headers = {"Content-Type": "application/json", **error_headers(error)}
        if firing.fault.retry_after is not None:
            headers["Retry-After"] = str(firing.fault.retry_after)
        with trio.move_on_after(BODY_SECONDS):
            while (await self._receive()).get("more_body"):
                pass
        firing.note(f"refused with {error.status}")
        body = error_body(error)
        headers["Content-Length"] = str(len(body))
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _reset(self, firing: FiringInterface) -> None:
        firing.note("connection reset")
        self._is_over = True
        self._running.cancel()
        if self._cut is None:
            raise FaultInjected(f"reset at {firing.fault.point}: this server cannot reset a connection")
        self._cut()

    async def _send_or_fail(self, message: Any) -> None:
        if self._is_over:
            return
        if message["type"] == "http.response.start":
            self._is_stream = any(value == b"text/event-stream" for _, value in message["headers"])
        elif self._is_stream and message.get("body"):
            self._pieces += 1
            for firing in self._faults.hits("http.chunk", request=self._request, token=self._pieces):
                await self._break_off(firing, message["body"])
                if self._is_over:
                    return
        await self._send(message)

    async def _break_off(self, firing: FiringInterface, data: bytes) -> None:
        match firing.action:
            case "slow":
                firing.note(f"waits {firing.fault.duration:g} s")
                await trio.sleep(firing.fault.duration)
            case "reset":
                self._reset(firing)
            case "half":
                half = {"type": "http.response.body", "body": data[: len(data) // 2], "more_body": True}
                await self._send(half)
                self._reset(firing)
                firing.note("half an event, and a reset")
            case "end":
                await self._end(firing, b"", "ended without a finish")
            case "error":
                error = _error(f"error at {firing.fault.point}", 500)
                await self._end(firing, error_event(error), "ended with an error event")

    async def _end(self, firing: FiringInterface, last: bytes, effect: str) -> None:
        firing.note(effect)
        self._is_over = True
        with trio.CancelScope(shield=True):  # the end is a disconnect, which cancels the handler
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        self._running.cancel()


def _error(what: str, status: int) -> RequestError:
    error = RequestError(f"injected fault: {what}")
    error.status, error.code = status, "injected_fault"
    error.type = QueueFull.type if status == QueueFull.status else "server_error"
    return error
