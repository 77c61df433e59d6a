"""A crowd of streams, read with as little work as possible, because the measured server shares the cores.

All requests are sent at once over connections of their own, and nothing is parsed before a stream ends.
"""

from __future__ import annotations

import re
import selectors
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec

from ullm.errors import ServerUnreachable, UllmError

READ_BYTES = 1 << 18
TAIL_BYTES = 2048
"""Bytes of the end of each stream that are kept; they hold its last events."""
SHOWN_BYTES = 200
"""Bytes of the end of a stream that an error shows."""
PROMPTS = 100
"""Number of different prompts."""
SILENCE = 60.0
"""Seconds without a byte of any stream after which the server has failed."""
_USAGE = re.compile(rb'"completion_tokens":(\d+)')


class StreamBroken(UllmError):
    """A stream is incomplete; shows its end."""

    def __init__(self, tail: bytes) -> None:
        end = tail[-SHOWN_BYTES:].decode(errors="replace")
        super().__init__(f"a stream ended without its tokens, usage and [DONE]: {end!r}")


@dataclass
class CrowdResult:
    """What a crowd has received; times are seconds.

    Args:
        first: times from the first request to each stream's first bytes.
        gaps: times between one piece of a stream and the next.
        events: number of server-sent events with text.
    """

    seconds: float = 0.0
    tokens: int = 0
    events: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class _Stream:
    """One stream: the time of its last piece, and its end."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.tail = b""


def listen(host: str, port: int, model: str, streams: int, tokens: int) -> CrowdResult:
    """Request ``streams`` streams of ``tokens`` tokens at once, and read all of them to their ends. Blocks.

    Raises:
        StreamBroken: a stream does not have its tokens.
        ServerUnreachable: the server refuses connections, or falls silent.
    """
    result, began = CrowdResult(), time.monotonic()
    with selectors.DefaultSelector() as selector, ExitStack() as sockets:
        for number in range(streams):
            sock = sockets.enter_context(_connect(host, port))
            sock.sendall(_request(host, port, model, number, tokens))
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, _Stream())
        while selector.get_map():
            ready = selector.select(SILENCE)
            if not ready:
                raise ServerUnreachable(f"http://{host}:{port}", f"it was silent for {SILENCE:g} s")
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)  # what was registered above
                if not _read(key.fileobj, key.data, result, began):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    result.tokens += _tokens(key.data.tail, tokens)
    result.seconds = time.monotonic() - began
    result.events -= 2 * streams  # the usage, and [DONE]
    return result


def _connect(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port))
    except OSError as error:
        raise ServerUnreachable(f"http://{host}:{port}", error.strerror or str(error)) from None


def _request(host: str, port: int, model: str, number: int, tokens: int) -> bytes:
    body = {"model": model, "prompt": f"{number % PROMPTS}", "max_tokens": tokens, "temperature": 0}
    options = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    content = msgspec.json.encode(body | options)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def _read(sock: socket.socket, stream: _Stream, result: CrowdResult, began: float) -> bool:
    """Read what has arrived; return False at the stream's end."""
    try:
        data = sock.recv(READ_BYTES)
    except ConnectionResetError:
        return False
    now = time.monotonic()
    if data and stream.last is None:
        result.first.append(now - began)
    elif data and stream.last is not None:
        result.gaps.append(now - stream.last)
    stream.last = now
    stream.tail = (stream.tail + data)[-TAIL_BYTES:]
    result.events += data.count(b"data: ")
    return bool(data)


def _tokens(tail: bytes, expected: int) -> int:
    counts = _USAGE.findall(tail)
    if not counts or int(counts[-1]) != expected or b"data: [DONE]" not in tail:
        raise StreamBroken(tail)
    return expected
