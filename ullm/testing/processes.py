"""Servers as processes of their own: start one, see what its tree takes, stop it. Needs psutil."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import trio

from ullm.client.http import Connection, Endpoint
from ullm.errors import ServerRefused, ServerUnreachable, UllmError, UsageError

POLL = 0.02
"""Seconds between two looks at something that sends no event."""
STOP_SECONDS = 40.0
"""How long a server may take to leave after SIGTERM before its whole tree is killed."""
TAIL = 2000
"""Bytes of a log that an error shows."""


class ServerEnded(UllmError):
    """A server that was started here is not ready in time, or has ended; shows the end of its log."""

    def __init__(self, name: str, what: str, log: Path) -> None:
        tail = log.read_bytes()[-TAIL:].decode("utf-8", "replace") if log.exists() else ""
        super().__init__(f"{name} {what}; its log {log} ends: {tail.strip()}")


def psutil_module() -> Any:
    """psutil, which only benchmarks need.

    Raises:
        UsageError: it is not installed.
    """
    return _optional("psutil")


def matplotlib_module() -> Any:
    """matplotlib, which only plots need.

    Raises:
        UsageError: it is not installed.
    """
    return _optional("matplotlib")


def _optional(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"this needs {name}; pip install 'ullm[bench]'") from None


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class ServerProcess:
    """A server in a process of its own; made by `open_server`.

    Args:
        name: for errors.
        endpoint: where its API answers.
        log: file that has its stdout and stderr.
    """

    def __init__(self, name: str, process: trio.Process, endpoint: Endpoint, log: Path) -> None:
        self.name = name
        self.endpoint = endpoint
        self.log = log
        self.process = process
        self.started = trio.current_time()
        self._seen = {process.pid: psutil_module().Process(process.pid)}

    @property
    def pid(self) -> int:
        """Of the server itself."""
        return self.process.pid

    async def wait_answer(self, path: str, seconds: float, *, any_status: bool = False) -> float:
        """Wait until ``GET path`` answers 200; the seconds since the command was given.

        Args:
            path: from the root, not below the endpoint's prefix.
            any_status: an error status is an answer, too.

        Raises:
            ServerEnded: it ended, or did not answer within ``seconds``.
        """
        with trio.move_on_after(seconds):
            while self.process.poll() is None:
                if await answers(self.endpoint, path, any_status=any_status):
                    return trio.current_time() - self.started
                await trio.sleep(POLL)
            raise ServerEnded(self.name, f"ended with status {self.process.returncode}", self.log)
        raise ServerEnded(self.name, f"does not answer {path} after {seconds:g} s", self.log)

    def tree(self) -> list[Any]:
        """It, all below it, and what was seen there before; remembered, so that `open_server` leaves none."""
        found = [] if self.process.returncode is not None else descendants(self.pid)
        self._seen |= {process.pid: process for process in found}
        return list(self._seen.values())

    def leftovers(self) -> list[Any]:
        """What is still there of all that `tree` ever saw, zombies excluded."""
        return [process for process in self._seen.values() if _is_there(process)]

    async def stop(self, within: float = STOP_SECONDS) -> tuple[int | None, float]:
        """SIGTERM; its exit status, None if it did not leave, and the seconds it took."""
        began = trio.current_time()
        self.tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(within):
            await self.process.wait()
        return self.process.returncode, trio.current_time() - began


@asynccontextmanager
async def open_server(
    name: str,
    command: Sequence[str],
    endpoint: Endpoint,
    log: Path,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[ServerProcess]:
    """Start ``command``; whatever is left of its tree at the end of the block is killed.

    Raises:
        UsageError: the command cannot be run.
    """
    psutil_module()
    with log.open("wb") as output:
        try:
            process = await trio.lowlevel.open_process(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(environ or {}),
            )
        except OSError as error:
            raise UsageError(f"{name}: cannot run {command[0]}: {error.strerror}") from None
    server = ServerProcess(name, process, endpoint, log)
    try:
        yield server
    finally:
        with trio.CancelScope(shield=True):
            for each in server.tree():
                _kill(each)
            await process.wait()


def descendants(pid: int) -> list[Any]:
    """All processes below one, as psutil's; none if it is gone."""
    psutil = psutil_module()
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def tree_memory(pid: int) -> int:
    """Bytes that a process and all below it take: proportional set size, else resident."""
    psutil = psutil_module()
    total = 0
    for process in [psutil.Process(pid), *descendants(pid)]:
        try:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.rss)
        except psutil.Error:
            continue  # it ended while we looked
    return total


async def answers(endpoint: Endpoint, path: str, *, any_status: bool = False) -> bool:
    """Whether ``GET path`` is answered with 200, or at all."""
    connection = Connection(at_root(endpoint))
    try:
        async with connection.request("GET", path) as pieces:
            async for _ in pieces:
                pass
        return True
    except ServerRefused:
        return any_status
    except ServerUnreachable:
        return False
    finally:
        await connection.aclose()


def at_root(endpoint: Endpoint) -> Endpoint:
    """The same server without the prefix."""
    return Endpoint(endpoint.scheme, endpoint.host, endpoint.port, "", endpoint.api_key)


def _kill(process: Any) -> None:
    psutil = psutil_module()
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _is_there(process: Any) -> bool:
    psutil = psutil_module()
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
