"""A small HTTP/1.1 client on trio for OpenAI-compatible servers, lighter than the servers it measures.

One `Connection` carries one request at a time and is reused while the server allows it.
"""

from __future__ import annotations

import socket
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
import trio

from ullm.errors import ServerRefused, ServerUnreachable, UsageError

CONNECT_TIMEOUT = 10.0
_READ_SIZE = 1 << 16
DONE = b"[DONE]"


@dataclass(frozen=True)
class Endpoint:
    """The address of an OpenAI-compatible API.

    Args:
        scheme: ``http``, ``https``, or ``unix``, whose ``host`` is the socket's path.
        prefix: path in front of ``/chat/completions``, usually ``/v1``.
    """

    scheme: str
    host: str
    port: int
    prefix: str
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Endpoint:
        """Parse ``http://host:port[/prefix]``; without a path the prefix is ``/v1``.

        Raises:
            UsageError: not such a URL.
        """
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise UsageError(f"--url {url}: expected http://host:port or https://host:port")
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/") or "/v1", api_key)

    @property
    def url(self) -> str:
        """The URL as a user writes it."""
        return f"{self.scheme}://{self.host}:{self.port}{self.prefix}"

    def headers(self) -> list[tuple[str, str]]:
        """Return the headers of every request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        named = "localhost" if self.scheme == "unix" else f"{host}:{self.port}"
        always = [("Host", named), ("User-Agent", "ullm"), ("Accept", "*/*")]
        return always + ([("Authorization", f"Bearer {self.api_key}")] if self.api_key else [])


class Connection:
    """One connection to a server, opened at its first request and again when it was closed.

    Args:
        receive_buffer: bytes that the kernel and one read may take ahead; None: plenty. With a small one
            the server notices a slow reader.

    Attributes:
        headers: headers of the last answer, names in lower case.
        local_port: the port of this end of the last TCP connection; None before the first one.
    """

    def __init__(self, endpoint: Endpoint, *, receive_buffer: int | None = None) -> None:
        self.endpoint = endpoint
        self.headers: dict[str, str] = {}
        self.local_port: int | None = None
        self._receive_buffer = receive_buffer
        self._stream: trio.abc.Stream | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def aclose(self) -> None:
        """Close the connection."""
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)
            self._stream = None

    @asynccontextmanager
    async def request(
        self, method: str, path: str, body: Any = None
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Send one request and yield the pieces of the answer's body; leaving early closes the connection.

        Raises:
            ServerUnreachable: there is no connection, or it broke.
            ServerRefused: the answer has an error status.
        """
        try:
            response = await self._exchange(method, path, body)
            self.headers = {name.decode(): value.decode("latin-1") for name, value in response.headers}
            if response.status_code >= 400:
                raise ServerRefused(self._url(path), response.status_code, await self._error())
            async with aclosing(self._body()) as pieces:
                yield pieces
        except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            raise ServerUnreachable(self.endpoint.url, _reason(error)) from error
        finally:
            await self._recycle()

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request and return its JSON answer.

        Raises:
            ServerUnreachable, ServerRefused: as `request`.
        """
        async with self.request(method, path, body) as pieces:
            content = b"".join([piece async for piece in pieces])
        try:
            return msgspec.json.decode(content)
        except msgspec.DecodeError:
            raise ServerUnreachable(self._url(path), "the answer is not JSON") from None

    @asynccontextmanager
    async def events(self, path: str, body: Any) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """POST and yield the payload of each server-sent event, `DONE` excluded.

        Raises:
            ServerUnreachable, ServerRefused: as `request`.
        """
        async with self.request("POST", path, body) as pieces, aclosing(_payloads(pieces)) as payloads:
            yield payloads

    async def _exchange(self, method: str, path: str, body: Any) -> h11.Response:
        reused = self._stream is not None
        try:
            await self._send(method, path, body)
            return await self._response()
        except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError):
            if not reused:
                raise
        # The server has closed the idle connection, perhaps while we wrote; retry once on a new one.
        await self.aclose()
        self._http = h11.Connection(h11.CLIENT)
        await self._send(method, path, body)
        return await self._response()

    async def _response(self) -> h11.Response:
        response = await self._next()
        while isinstance(response, h11.InformationalResponse):
            response = await self._next()
        assert isinstance(response, h11.Response)  # h11 raises RemoteProtocolError otherwise
        return response

    async def _send(self, method: str, path: str, body: Any) -> None:
        content = b"" if body is None else msgspec.json.encode(body)
        headers = self.endpoint.headers()
        if body is not None:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        request = h11.Request(method=method, target=self.endpoint.prefix + path, headers=headers)
        data = b""
        for event in (request, h11.Data(data=content), h11.EndOfMessage()):
            data += self._http.send(event) or b""
        await (self._stream or await self._open()).send_all(data)

    async def _open(self) -> trio.abc.Stream:
        with trio.move_on_after(CONNECT_TIMEOUT):
            if self.endpoint.scheme == "unix":
                self._stream = await trio.open_unix_socket(self.endpoint.host)
            elif self.endpoint.scheme == "https":
                context = ssl.create_default_context()
                self._stream = await trio.open_ssl_over_tcp_stream(
                    self.endpoint.host, self.endpoint.port, ssl_context=context, https_compatible=True
                )
            else:
                self._stream = stream = await trio.open_tcp_stream(self.endpoint.host, self.endpoint.port)
                self.local_port = stream.socket.getsockname()[1]
                if self._receive_buffer is not None:
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
            return self._stream
        raise OSError(f"no connection within {CONNECT_TIMEOUT:g} s")

    async def _next(self) -> h11.Event:
        assert self._stream is not None  # only called after a request was sent
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                size = self._receive_buffer or _READ_SIZE
                self._http.receive_data(bytes(await self._stream.receive_some(size)))
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                raise OSError("the server hung up")
            else:
                assert isinstance(event, h11.Event)  # what is left of next_event's union
                return event

    async def _body(self) -> AsyncGenerator[bytes, None]:
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)

    async def _error(self) -> str:
        content = b"".join([piece async for piece in self._body()])
        return error_message(content) or content[:200].decode("utf-8", "replace").strip() or "no message"

    async def _recycle(self) -> None:
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return
        await self.aclose()
        self._http = h11.Connection(h11.CLIENT)

    def _url(self, path: str) -> str:
        return self.endpoint.url + path


def error_message(content: bytes) -> str | None:
    """Return the message of an OpenAI error body; None for any other body."""
    try:
        error = msgspec.json.decode(content).get("error")
    except (msgspec.DecodeError, AttributeError):
        return None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message).strip() if message else None


async def _payloads(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (payload := line[5:].strip()) != DONE:
                yield payload


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or "the connection broke"
