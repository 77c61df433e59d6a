"""The sockets on which front ends are expected: only this user reaches them, or a key protects them."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ullm.errors import ConfigError, ResourceUnavailable
from ullm.link.address import Address
from ullm.server import claim, unix_socket, urls

BACKLOG = 256
_MODE = 0o600


@contextmanager
def open_front_end_socket(
    where: str, key: bytes | None = None, has_tls: bool = False, *, option: str = "--listen"
) -> Iterator[socket.socket]:
    """Listen for front ends within this block; then close the socket and remove its file.

    Args:
        option: that the address comes from, for errors.
        has_tls: whether front ends have to show a certificate.

    Raises:
        ConfigError: the address cannot be used, or others than this user could reach it and there is no key.
    """
    address = Address.parse(option, where)
    if address.is_unix and not address.path.startswith("\0"):
        with unix_socket(f"{option} {where}", address.path, _MODE) as sock:
            yield sock
        return
    if not address.is_unix and key is None and not has_tls:
        raise ConfigError(
            f"{option} {where}: whoever reaches this port could run requests; set --engine-key-file or "
            "ULLM_ENGINE_KEY to the same key for the engine and its front ends, or --link-certfile for both, "
            "or use unix:PATH"
        )
    with _without_file(f"{option} {where}", address) as sock:
        yield sock


def _without_file(option: str, address: Address) -> socket.socket:
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
        raise ResourceUnavailable(f"{option}: {error.strerror or error}") from None
    return sock


def shown(sock: socket.socket) -> str:
    """Return where a socket listens, as ``--connect`` takes it."""
    return urls([sock])[0].removeprefix("http://")
