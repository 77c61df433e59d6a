"""The socket on which an engine listens for front ends: of this user only, or protected by a key."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ullm.errors import ConfigError, ResourceUnavailable
from ullm.link.address import Address
from ullm.server import claim, unix_socket

OPTION = "--listen"
BACKLOG = 256
_MODE = 0o600


@contextmanager
def open_front_end_socket(where: str, key: bytes | None, has_tls: bool = False) -> Iterator[socket.socket]:
    """Listen for front ends within this block; then close the socket and remove its file.

    Args:
        has_tls: whether front ends have to show a certificate.

    Raises:
        ConfigError: the address cannot be used, or others than this user could reach it and there is no key.
    """
    address = Address.parse(OPTION, where)
    if address.is_unix and not address.path.startswith("\0"):
        with unix_socket(f"{OPTION} {where}", address.path, _MODE) as sock:
            yield sock
        return
    if not address.is_unix and key is None and not has_tls:
        raise ConfigError(
            f"{OPTION} {where}: whoever reaches this port could run requests; set --engine-key-file or "
            "ULLM_ENGINE_KEY to the same key for the engine and its front ends, or --link-certfile for both, "
            "or use unix:PATH"
        )
    with _without_file(where, address) as sock:
        yield sock


def _without_file(where: str, address: Address) -> socket.socket:
    sock: socket.socket | None = None
    try:
        if address.is_unix and sys.platform != "win32":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.bind(address.path)
            sock.listen(BACKLOG)
            return sock
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )[0]
        sock = socket.socket(family, kind, protocol)
        claim(sock, place)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ResourceUnavailable(f"{OPTION} {where}: {error.strerror or error}") from None
    return sock


def shown(sock: socket.socket) -> str:
    """Return where a socket listens, as ``--connect`` takes it."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        name = sock.getsockname()
        if isinstance(name, bytes):  # in the abstract namespace
            return "unix:@" + name[1:].decode()
        return f"unix:{name}"
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
