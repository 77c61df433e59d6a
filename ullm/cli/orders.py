"""What a launcher tells a process that it starts: what it is to be, through the process's stdin."""

from __future__ import annotations

import os
import struct

import msgspec

from ullm.config import EngineConfig, ServerConfig

STDIN = 0
_LENGTH = struct.Struct("<I")


class Order(msgspec.Struct, frozen=True):
    """What a launched process is to be.

    Args:
        server: an engine's has ``headless``, a front end's ``connect``.
        sockets: descriptors that it inherits and that listen for the API.
    """

    engine: EngineConfig
    server: ServerConfig
    sockets: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """Return it as the launcher writes it to the process's stdin."""
        body = msgspec.msgpack.encode(self)
        return _LENGTH.pack(len(body)) + body


def read_order() -> Order | None:
    """Read the order from stdin; None if the launcher has gone before it was complete."""
    (length,) = _LENGTH.unpack(_read(_LENGTH.size) or bytes(_LENGTH.size))
    body = _read(length)
    return msgspec.msgpack.decode(body, type=Order) if body else None


def _read(count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(STDIN, count - len(data))
        if not piece:
            return b""
        data += piece
    return data
