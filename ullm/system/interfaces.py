"""Network interfaces of this host, by their addresses."""

from __future__ import annotations

import socket
import struct
import sys

_SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface; see netdevice(7)."""


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has an IPv4 address; None if none has, or not on Linux."""
    if sys.platform != "linux":
        return None
    import ullm.system.posix

    fcntl = ullm.system.posix.fcntl
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
