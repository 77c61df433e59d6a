"""Forwards what concerns stored answers from a front end to the process that keeps them, over a unix socket.

One connection per request. A client that leaves closes it, and one that does not read holds back its other
end, which so sees the clients as they are.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import quote

import h11
import trio
from quart import Response, g, request

from ullm.server.access import FORWARDED_CLIENT, FORWARDED_OWNER
from ullm.server.api.errors import AnswerInterrupted, AnswersAway
from ullm.server.api.message_errors import is_messages
from ullm.server.api.requests import SESSION_HEADER, TIMEOUT_HEADER
from ullm.server.http.quart_connection import sent
from ullm.server.http.sse import ANTHROPIC, OPENAI
from ullm.server.routes.service import Service

_PASSED_ON = ("Content-Type", "Content-Encoding", "Last-Event-ID", TIMEOUT_HEADER, SESSION_HEADER)
"""Headers of a request that handlers read. The others are this front end's business, keys first of all."""
_OF_THE_CONNECTION = frozenset(
    ("connection", "content-length", "date", "keep-alive", "server", "transfer-encoding")
)
_RECEIVE = 65536


async def forward(service: Service) -> Response:
    """Have the current request answered where the answers are kept, and pass the answer on.

    Raises:
        AnswersAway: nobody listens there.
        AnswerInterrupted: that process has ended before its answer was whole.
    """
    where = service.config.answers
    assert where is not None, "the caller has checked"
    with service.engine.answering():
        try:
            stream = await trio.open_unix_socket(_path(where))
        except OSError as error:
            raise AnswersAway(error) from None
        async with stream:
            call = _Call(stream)
            await call.send()
            answer = await call.head()
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                return await _pass_on_events(service, call)
            return Response(await call.rest(), answer.status, headers=answer.headers)


def _path(where: str) -> str:
    path = where.removeprefix("unix:")
    return f"\0{path[1:]}" if path.startswith("@") else path


async def _pass_on_events(service: Service, call: _Call) -> Response:
    messages = is_messages(request.path)
    if messages:
        g.common_headers |= {"request-id": g.request_id}
    async with service.event_stream(ANTHROPIC if messages else OPENAI) as stream:
        held = b""
        while (piece := await call.piece()) is not None:
            whole, end, held = (held + piece).rpartition(b"\n\n")
            if end:  # an event is passed on as a whole, so that an error can follow where it breaks off
                await stream.write(whole + end)
    return sent()


class _Head(NamedTuple):
    """The beginning of an answer; the names of headers in lower case."""

    status: int
    headers: dict[str, str]


class _Call:
    """The current request on a connection of its own."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._connection = h11.Connection(h11.CLIENT)

    async def send(self) -> None:
        """Send the request.

        Raises:
            AnswersAway: nobody reads it.
        """
        body: bytes = await request.get_data(as_text=False)  # type: ignore[assignment]
        head = h11.Request(method=request.method, target=_target(), headers=_headers(body))
        pieces = [self._connection.send(each) for each in (head, h11.Data(data=body), h11.EndOfMessage())]
        try:
            await self._stream.send_all(b"".join(filter(None, pieces)))
        except trio.BrokenResourceError as error:
            raise AnswersAway(error) from None

    async def head(self) -> _Head:
        """Return the beginning of the answer.

        Raises:
            AnswerInterrupted: there is none.
        """
        answer = await self._event()
        assert isinstance(answer, h11.Response), "an app sends no informational responses"
        pairs = ((name.decode(), value.decode("latin-1")) for name, value in answer.headers)
        return _Head(
            answer.status_code, {name: value for name, value in pairs if name not in _OF_THE_CONNECTION}
        )

    async def piece(self) -> bytes | None:
        """Return the next piece of the body; None at its end.

        Raises:
            AnswerInterrupted: it breaks off.
        """
        event = await self._event()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    async def rest(self) -> bytes:
        """Return the whole body."""
        pieces = []
        while (piece := await self.piece()) is not None:
            pieces.append(piece)
        return b"".join(pieces)

    async def _event(self) -> object:
        try:
            while (event := self._connection.next_event()) is h11.NEED_DATA:
                self._connection.receive_data(await self._stream.receive_some(_RECEIVE))
        except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            raise AnswerInterrupted(
                "the process that keeps stored answers has ended; what it has written down goes on after its "
                "next start"
            ) from error
        return event


def _target() -> bytes:
    scope = request.scope
    path = scope.get("raw_path") or quote(request.path).encode()
    query: bytes = scope.get("query_string", b"")
    return path + (b"?" + query if query else b"")


def _headers(body: bytes) -> list[tuple[str, str]]:
    headers = [
        ("Host", "localhost"),
        ("Connection", "close"),
        ("Content-Length", str(len(body))),
        ("X-Request-Id", g.request_id),
        (FORWARDED_OWNER, g.owner),
        (FORWARDED_CLIENT, g.client),
    ]
    return headers + [(name, request.headers[name]) for name in _PASSED_ON if name in request.headers]
