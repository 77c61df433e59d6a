"""Servers in processes of their own: start one, measure its process tree, stop it. Needs psutil."""

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
from ullm.errors import ResourceUnavailable, ServerRefused, ServerUnreachable, UllmError
from ullm.system.interpreter import python_environment
from ullm.testing.environment import environment_for_tests

POLL = 0.02
"""Seconds between two checks of something that sends no event."""
STOP_SECONDS = 40.0
"""Seconds that a server may take to exit after SIGTERM before its whole tree is killed."""
TAIL = 2000
"""Bytes of the end of a log that an error shows."""


class ServerEnded(UllmError):
    """A started server was not ready in time, or has ended; shows the end of its log."""

    def __init__(self, name: str, what: str, log: Path) -> None:
        tail = log.read_bytes()[-TAIL:].decode("utf-8", "replace") if log.exists() else ""
        super().__init__(f"{name} {what}; its log {log} ends: {tail.strip()}")


def psutil_module() -> Any:
    """Import psutil, which only benchmarks need.

    Raises:
        ResourceUnavailable: it is not installed.
    """
    return _optional("psutil")


def matplotlib_module() -> Any:
    """Import matplotlib, which only plots need.

    Raises:
        ResourceUnavailable: it is not installed.
    """
    return _optional("matplotlib")


def _optional(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ResourceUnavailable(f"this needs {name}: pip install {name}") from None


def free_port() -> int:
    """Return a TCP port of loopback that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class MeasuredServer:
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
        """The server process's id."""
        return self.process.pid

    async def wait_answer(self, path: str, seconds: float, *, any_status: bool = False) -> float:
        """Wait until ``GET path`` answers 200; return the seconds since the server was started.

        Args:
            path: from the root, not below the endpoint's prefix.
            any_status: count an error status as an answer, too.

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
        """Return the server and all descendants seen so far; `open_server` kills all of them at its end."""
        processes = [] if self.process.returncode is not None else descendants(self.pid)
        self._seen |= {process.pid: process for process in processes}
        return list(self._seen.values())

    def leftovers(self) -> list[Any]:
        """Return the processes that `tree` ever saw and that still run, zombies excluded."""
        return [process for process in self._seen.values() if _is_there(process)]

    async def stop(self, within: float = STOP_SECONDS) -> tuple[int | None, float]:
        """Send SIGTERM; return the exit status, None if the server did not exit, and the seconds it took."""
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
    under_test: bool = False,
) -> AsyncIterator[MeasuredServer]:
    """Start ``command``; kill whatever is left of its process tree at the end of the block.

    Args:
        environ: variables beside this process's own.
        under_test: leave out variables that configure ullm; they are meant for other servers.

    Raises:
        ResourceUnavailable: the command cannot be run.
    """
    psutil_module()
    inherited = environment_for_tests() if under_test else dict(os.environ) | python_environment()
    with log.open("wb") as output:
        try:
            process = await trio.lowlevel.open_process(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=inherited | dict(environ or {}),
            )
        except OSError as error:
            raise ResourceUnavailable(f"{name}: cannot run {command[0]}: {error.strerror}") from None
    server = MeasuredServer(name, process, endpoint, log)
    try:
        yield server
    finally:
        with trio.CancelScope(shield=True):
            for each in server.tree():
                _kill(each)
            await process.wait()


def descendants(pid: int) -> list[Any]:
    """Return all descendants of a process, as psutil's processes; none if it is gone."""
    psutil = psutil_module()
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def tree_memory(pid: int) -> int:
    """Return the memory of a process and its descendants in bytes: proportional set size, else resident."""
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
    """Return True if ``GET path`` is answered with 200, or with any status if ``any_status``."""
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
    """Return the endpoint of the same server without the prefix."""
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
