"""The end of a socket that listens: who is connected by then is accepted, who comes later is refused.

The kernel resets the connections that still wait in the queue of a socket that is closed, although their
clients have been told that they are connected, and may have sent a request.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys

_ATTACH_FILTER = 26
"""SO_ATTACH_FILTER (Linux's asm-generic/socket.h)."""
_NO_NEW_CONNECTIONS = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header with the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone asks for a connection:
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # let everything else through: handshakes that have begun come to their end
)
"""A packet filter (classic BPF), instruction by instruction: code, jumps if true and if false, operand."""


def take_last(listening: socket.socket) -> list[socket.socket]:
    """Let nobody else connect; accept and return the connections that wait. The socket can then be closed.

    Clients that ask for a connection meanwhile are refused, over TCP when they try again after a second.
    """
    with contextlib.suppress(OSError):
        if listening.family in (socket.AF_INET, socket.AF_INET6):
            _drop_requests(listening)
        else:
            listening.shutdown(socket.SHUT_RD)
    found = []
    with contextlib.suppress(OSError):  # none waits, or there are no descriptors left
        while True:
            found.append(listening.accept()[0])
    return found


def _drop_requests(listening: socket.socket) -> None:
    """Have the kernel drop further requests for connections.

    Raises:
        OSError: it has no such filters.
    """
    if sys.platform != "linux":
        listening.listen(0)  # the next best thing: room for one
        return
    import ctypes

    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _NO_NEW_CONNECTIONS)
    kept = ctypes.create_string_buffer(program, len(program))  # the kernel copies it
    listening.setsockopt(
        socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", len(_NO_NEW_CONNECTIONS), ctypes.addressof(kept))
    )
