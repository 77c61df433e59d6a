"""Who is at the other end of a unix socket."""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trio

_CREDENTIALS = struct.Struct("3i")
"""Process, user and group; see unix(7)."""


def foreign_user(sock: socket.socket | trio.socket.SocketType) -> int | None:
    """Return the user at the other end of a unix socket, if it is neither this process's own nor root.

    Linux says so; elsewhere None, and the mode of the socket's file decides who connects.
    """
    if sys.platform != "linux":
        return None
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    return None if user in (0, os.geteuid()) else user
