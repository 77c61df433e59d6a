"""Sockets that listen: on an address, on a path, or inherited from whoever started the process."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ullm.config import ServerConfig
from ullm.errors import PortTaken, ResourceUnavailable
from ullm.logs import get_logger
from ullm.server.web_pages import is_loopback

log = get_logger(__name__)

BACKLOG = 2048
"""Connections that the kernel holds until they are accepted."""


FIRST_INHERITED = 3
"""The first descriptor that a process inherits from systemd, which starts it when somebody connects."""
INHERITED_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@contextmanager
def open_sockets(
    server_config: ServerConfig, inherited: Sequence[socket.socket] = ()
) -> Iterator[list[socket.socket]]:
    """Listen for the API within this block; then close the sockets and remove the file of ours.

    Args:
        inherited: listen already, and are served instead of what the configuration says.

    Raises:
        PortTaken: another program listens there.
        ConfigError: the address or path cannot be used.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in inherited]
        if inherited:
            log.info(
                "listening where the starter of this process does; --host, --port and --uds are not used",
                urls=urls(sockets),
            )
        elif server_config.uds is not None:
            option = f"--uds {server_config.uds}"
            sockets = [stack.enter_context(unix_socket(option, server_config.uds))]
        else:
            sockets = [stack.enter_context(bind(server_config))]
        yield sockets


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the sockets that systemd passes on (sd_listen_fds), and forget the variables that say so.

    Raises:
        ConfigError: one of them is not a stream socket that listens.
    """
    told = [environ.pop(name, "") for name in INHERITED_VARIABLES]
    pid, count, _ = told
    if pid != str(os.getpid()) or not count.isdecimal() or sys.platform == "win32":
        return []  # it is meant for another process, as the protocol has it
    return [inherited_socket(number) for number in range(FIRST_INHERITED, FIRST_INHERITED + int(count))]


def inherited_socket(descriptor: int) -> socket.socket:
    """Return the socket that listens on a descriptor.

    Raises:
        ConfigError: there is none.
    """
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ResourceUnavailable(f"LISTEN_FDS: descriptor {descriptor}: {error.strerror}") from None
    if not listens:
        raise ResourceUnavailable(
            f"LISTEN_FDS: descriptor {descriptor} is no stream socket that listens; use ListenStream= and "
            "Accept=no in the socket unit"
        )
    sock.setblocking(False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def bind(server_config: ServerConfig) -> socket.socket:
    """Bind the address and listen, so that a port in use is reported before the model loads.

    Connections wait in the backlog until `serve_http` runs.

    Raises:
        PortTaken: another program listens there.
        ConfigError: the address does not belong to this machine.
    """
    host, port = server_config.host, server_config.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ResourceUnavailable(f"--host {host}: {error.strerror or error}") from None
    sock = socket.socket(family, kind, protocol)
    try:
        claim(sock, address)
    except OSError as error:
        sock.close()
        raise _bind_error(error, host, port) from None
    return sock


def claim(sock: socket.socket, address: tuple[Any, ...]) -> None:
    """Bind a TCP socket exclusively and listen.

    Raises:
        OSError: the address is in use, or does not belong to this machine.
    """
    if sys.platform == "win32":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    sock.bind(address)
    sock.listen(BACKLOG)


def _bind_error(error: OSError, host: str, port: int) -> Exception:
    if error.errno in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE)):
        return PortTaken(host, port)
    return ResourceUnavailable(f"cannot listen on --host {host} --port {port}: {error.strerror or error}")


def urls(sockets: Sequence[socket.socket], scheme: str = "http") -> list[str]:
    """Return the URLs of the sockets, with the real port where ``--port 0`` was given."""
    addresses = []
    for sock in sockets:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            name = sock.getsockname()  # bytes in Linux's abstract namespace
            addresses.append(f"unix:@{name[1:].decode()}" if isinstance(name, bytes) else f"unix:{name}")
            continue
        host, port = sock.getsockname()[:2]
        addresses.append(f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}")
    return addresses


def warn_if_open(server_config: ServerConfig, sock: socket.socket) -> None:
    """Warn once if other machines can reach the API and no key is asked for."""
    address = sock.getsockname()
    if server_config.api_keys or isinstance(address, str | bytes):  # the path of a unix socket
        return
    host = address[0]
    if not is_loopback(host):
        log.warning(
            "other machines can reach the API, and no key is asked for; use --api-key-file, or --host "
            "127.0.0.1 behind a proxy",
            host=host,
        )


def is_local(sock: socket.socket) -> bool:
    """Return whether a socket listens where only this machine reaches it, its browsers included."""
    return sock.family in (socket.AF_INET, socket.AF_INET6) and is_loopback(sock.getsockname()[0])


def file_remover(sock: socket.socket) -> Callable[[], object]:
    """Return a callback that unlinks the file of a socket from `unix_socket`.

    It is for exits that skip the cleanup.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return bool  # a TCP socket has no file
    path = sock.getsockname()
    if isinstance(path, bytes):
        return bool  # nor has one in Linux's abstract namespace
    return partial(_remove, path, os.stat(path).st_ino)


@contextmanager
def unix_socket(option: str, path: str, mode: int | None = None) -> Iterator[socket.socket]:
    """Listen on a path within this block; then close the socket and remove its file.

    Args:
        option: with its value, for errors.
        mode: of the file; None: what the umask gives.

    Raises:
        ConfigError: something else is there, or the file cannot be made.
    """
    path = os.path.abspath(path)
    if not hasattr(socket, "AF_UNIX"):
        raise ResourceUnavailable(f"{option}: no unix sockets on this system; listen on 127.0.0.1 and a port")
    _remove_stale_socket(option, path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.nullcontext() if mode is None else _umask(0o777 & ~mode):
            sock.bind(path)
        ours = os.stat(path).st_ino
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ResourceUnavailable(f"{option}: {error.strerror or error}") from None
    try:
        with sock:
            yield sock
    finally:
        _remove(path, ours)


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _remove_stale_socket(option: str, path: str) -> None:
    """Remove the socket of a server that has died, and nothing else."""
    try:
        status = os.lstat(path)
    except OSError:
        return  # nothing is there, or binding will report the error
    if not stat.S_ISSOCK(status.st_mode):
        raise ResourceUnavailable(f"{option}: this path exists and is not a socket; choose another")
    if _is_alive(path):
        raise ResourceUnavailable(f"{option}: another server listens there; stop it or choose another path")
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
