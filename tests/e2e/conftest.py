"""Real servers, real signals, real clients; each bounded in time, none leaves anything behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ullm.config import ModelConfig
from ullm.hub import resolve
from ullm.testing import write_scripted_model, write_tiny_model

START_SECONDS = 60.0


class Server:
    """``ullm serve`` in a process of its own.

    Args:
        arguments: after ``ullm serve --port 0``.
        command: another way to start it; must say ``ready: URL`` on stdout.
    """

    def __init__(
        self, *arguments: str, environ: Mapping[str, str] = {}, wait: bool = True, log: Path
    ) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ullm", "serve", "--port", "0", *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | dict(environ),
                text=True,
            )
        self.url = ""
        self.said = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if wait:
            self.wait_ready()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if line.startswith("ready: "):
                self.url = line.split()[1].removesuffix("/v1")
                self._ready.set()
        self._ready.set()

    def wait_ready(self) -> None:
        """Wait for the ready line; fail with the log if the server ends before."""
        assert self._ready.wait(START_SECONDS), f"not ready after {START_SECONDS} s\n{self.errors()}"
        assert self.url, f"ended before it was ready\n{self.errors()}"

    def errors(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_text("utf-8", "replace")

    def client(self, **options: Any) -> httpx.Client:
        """A plain HTTP client."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def children(self) -> list[psutil.Process]:
        """All processes below the server."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        return [p for p in self.children() if "ullm.actors.worker_main" in p.cmdline()]

    def worker(self) -> psutil.Process:
        """The one worker process."""
        (worker,) = self.workers()
        return worker

    def signal(self, number: int) -> None:
        """Send a signal to the server only."""
        self.process.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        """The exit status."""
        return self.process.wait(timeout)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers; afterwards checks that nothing of them is left."""
    servers: list[Server] = []
    seen: list[psutil.Process] = []

    def start(*arguments: str, **options: Any) -> Server:
        server = Server(*arguments, log=tmp_path / f"server{len(servers)}.log", **options)
        servers.append(server)
        if server.process.poll() is None:
            seen.extend([psutil.Process(server.process.pid), *server.children()])
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.signal(signal.SIGTERM)
            server.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
    eventually(lambda: all(map(is_gone, seen)), seconds=2)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The embedded default model, fetched and converted if it is not in the cache yet."""
    return resolve(ModelConfig()).path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand weights."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def scripted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scripted model that takes 5 ms a step."""
    return write_scripted_model(tmp_path_factory.mktemp("scripted"), step_seconds=0.005)


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended. An orphan stays a zombie where nobody reaps it, as in containers."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


SCRIPTED = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")
"""Options that serve `scripted_model`."""


def eventually(what: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that sends no event, such as another process's end."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
