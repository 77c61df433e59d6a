"""The process that parses one large body: ``python -m ullm.server.api.large_body_child``.

Its arguments are a schema, ``--max-entries``, and the size of the body. It reads the body from stdin and
writes a `Parsed` to stdout. The kernel ends it when it has used up its processor time, also inside of the
parser's C code. If its parent ends, so do its pipes, and it.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

import msgspec

from ullm.config import ServerConfig
from ullm.errors import RequestError
from ullm.server.api.body_parser import BodyParser
from ullm.server.api.errors import InvalidJSON
from ullm.server.api.nested_fields import Unknown

MOST_PARSED = 16 << 20
"""Bytes of a request without what is ignored, and without JSON's escapes; the event loop has to read them."""
OUT_OF_MEMORY = 77
if sys.platform == "win32":
    TOO_MUCH: tuple[int, ...] = (OUT_OF_MEMORY,)
else:
    TOO_MUCH = (OUT_OF_MEMORY, -signal.SIGPROF)
"""Exit statuses of a process that has used up what it may."""
SECONDS = 10.0
"""Processor time after the imports; a body of 64 MiB takes one."""
MEMORY_BYTES = 512 << 20
MEMORY_PER_BYTE = 12
"""Address space, and what each byte of the body adds: copies of it, texts of four bytes per character."""
NICENESS = 5
"""Below the server and its workers, which have other clients to serve."""


class Parsed(msgspec.Struct):
    """What became of a body.

    Args:
        fields: the request, in MessagePack.
        unknown: fields that nobody knows.
        error: why there is no request.
        is_json: whether the body is JSON, and the error is one of its values.
    """

    fields: bytes = b""
    unknown: list[Unknown] = []
    error: str | None = None
    param: str | None = None
    is_json: bool = True


def parsed(body: bytes, schema: type[msgspec.Struct], config: ServerConfig) -> Parsed:
    """Return what becomes of a body.

    Raises:
        MemoryError: there is not enough memory.
    """
    try:
        request, unknown = BodyParser(schema, config).parse(body)
    except RequestError as error:
        return Parsed(error=error.message, param=error.param, is_json=not isinstance(error, InvalidJSON))
    try:
        fields = msgspec.msgpack.encode(request)
    except OverflowError:
        return Parsed(error="the body has a whole number of more than 64 bits")
    if len(fields) > MOST_PARSED:
        return Parsed(
            error=f"the request has {len(fields)} bytes without JSON's escapes and what is ignored; at most "
            f"{MOST_PARSED}, whatever --max-body is"
        )
    return Parsed(fields, unknown)


def main() -> None:
    """Parse the body on stdin."""
    place, entries, size = sys.argv[1:]
    module, _, name = place.partition(":")
    schema = getattr(import_module(module), name)
    _limit(MEMORY_BYTES + MEMORY_PER_BYTE * int(size))
    try:
        body = sys.stdin.buffer.read()
        if len(body) < int(size):  # who has sent it is gone
            return
        answer = msgspec.msgpack.encode(parsed(body, schema, ServerConfig(max_entries=int(entries))))
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)
    sys.stdout.buffer.write(answer)


def _limit(memory: int) -> None:
    """Limit processor time and memory, where the system can."""
    if sys.platform != "win32":
        from ullm.system.posix import resource

        os.nice(NICENESS)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
