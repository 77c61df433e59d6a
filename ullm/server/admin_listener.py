"""The admin listener: the admin endpoints without a key, out of reach of other machines.

It listens on a unix socket, which only the user who runs the server may open, or on a loopback port.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import trio

from ullm.config import ServerConfig
from ullm.errors import ConfigError
from ullm.server.api.types import EngineInterface
from ullm.server.app import create_admin_app
from ullm.server.routes.service import Shutdown
from ullm.server.serve import BACKLOG, claim, serve_app

UNIX = "unix:"
_MODE = 0o600
MAX_CONNECTIONS = 16
"""Connections at a time; they come out of the reserve that the other server leaves."""


async def serve_admin(
    engine: EngineInterface,
    server_config: ServerConfig,
    *,
    sock: socket.socket,
    shutdown: Shutdown | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the admin endpoints and the probes until cancelled. Runs as a supervised child.

    Args:
        sock: from `open_admin_socket`.
        shutdown: see `ullm.server.app.create_app`.
        task_status: gets the URL.
    """
    app = create_admin_app(engine, server_config, shutdown=shutdown)
    await serve_app(
        app, server_config, sockets=[sock], max_connections=MAX_CONNECTIONS, task_status=task_status
    )


@contextmanager
def open_admin_socket(where: str) -> Iterator[socket.socket]:
    """Listen on ``unix:PATH`` or ``HOST:PORT`` within this block; then close the socket, remove its file.

    Raises:
        ConfigError: the address does not exist, is in use, or can be reached by other machines.
    """
    if where.startswith(UNIX):
        with _unix_socket(where) as sock:
            yield sock
    else:
        with _loopback_socket(where) as sock:
            yield sock


def file_remover(sock: socket.socket) -> Callable[[], object]:
    """Return a callback that unlinks the file of a socket from `open_admin_socket`.

    It is for exits that skip the cleanup.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return bool  # a TCP socket has no file
    path = sock.getsockname()
    return partial(_remove, path, os.stat(path).st_ino)


def _loopback_socket(where: str) -> socket.socket:
    host, colon, port = where.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--admin-listen {where}: expected unix:PATH or 127.0.0.1:PORT")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--admin-listen {where}: {error.strerror or error}") from None
    if not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"--admin-listen {where}: other machines could reach {host}, and this listener requires no key; "
            "use unix:PATH or 127.0.0.1:PORT, or --admin-key to open the endpoints on the server's own port"
        )
    sock = socket.socket(family, kind, protocol)
    try:
        claim(sock, address)
    except OSError as error:
        sock.close()
        raise ConfigError(f"--admin-listen {where}: {error.strerror or error}") from None
    return sock


@contextmanager
def _unix_socket(where: str) -> Iterator[socket.socket]:
    path = os.path.abspath(where.removeprefix(UNIX))
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError(f"--admin-listen {where}: no unix sockets on this system; use 127.0.0.1:PORT")
    _remove_stale_socket(where, path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        mask = os.umask(0o777 & ~_MODE)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        ours = os.stat(path).st_ino
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(f"--admin-listen {where}: {error.strerror or error}") from None
    try:
        with sock:
            yield sock
    finally:
        _remove(path, ours)


def _remove_stale_socket(where: str, path: str) -> None:
    """Remove the socket of a server that has died, and nothing else."""
    try:
        status = os.lstat(path)
    except OSError:
        return  # nothing is there, or binding will report the error
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"--admin-listen {where}: this path exists and is not a socket; choose another")
    if _is_alive(path):
        raise ConfigError(
            f"--admin-listen {where}: another server listens there; stop it or choose another path"
        )
    _remove(path, status.st_ino)


def _is_alive(path: str) -> bool:
    if sys.platform == "win32":
        return False  # Python has no unix sockets there
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
        return True


def _remove(path: str, inode: int) -> None:
    """Remove a socket's file, unless it has been replaced by another."""
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(path).st_ino == inode:
            os.unlink(path)
