"""``ullm serve`` in a process of its own, and its admin endpoints."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ullm.faults import FaultReport
from ullm.testing.leaks import import_psutil

if TYPE_CHECKING:
    from psutil import Process

SCRIPTED = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")
"""Options that serve a model from `write_scripted_model`."""

START_SECONDS = 60.0
STOP_SECONDS = 30.0
ANSWER_SECONDS = 60.0
ADMIN_SECONDS = 10.0
ADMIN_PATHS = ("/admin", "/sleep", "/wake")
"""How the paths of admin routes begin; a test compares them with the server's table of routes."""


class ServerFailed(AssertionError):
    """The server did not do what a server does; the message ends with what it wrote to stderr."""


class ServerProcess:
    """A server that a test has started; a context manager that stops it.

    Args:
        arguments: after ``ullm serve --port 0``.
        environ: variables beside this process's own.
        wait: until it is ready.
        log: file for its stderr.
        admin: serve the admin endpoints on a unix socket, for `request`.

    Attributes:
        url: such as ``http://127.0.0.1:40123``; empty until it is ready.
        said: what it wrote to stdout so far.
        faults: what shall go wrong in it; needs ``admin``.

    Raises:
        ServerFailed: it ended before it was ready, or is not within `START_SECONDS`.
    """

    def __init__(
        self,
        *arguments: str,
        environ: Mapping[str, str] = {},
        wait: bool = True,
        log: Path,
        admin: bool = False,
    ) -> None:
        self.log = log
        self.url = self.said = ""
        self.faults = ServerFaults(self)
        self._admin_folder = tempfile.TemporaryDirectory(prefix="ullm-") if admin else None
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ullm", "serve", "--port", "0", *self._admin_options(), *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | dict(environ),
                text=True,
            )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            try:
                self.wait_ready()
            except ServerFailed:
                self.close()
                raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- life --------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Wait for the ready line.

        Raises:
            ServerFailed: it does not come.
        """
        if not self._ready.wait(START_SECONDS):
            raise ServerFailed(f"not ready after {START_SECONDS:g} s\n{self.errors()}")
        if not self.url:
            raise ServerFailed(f"ended before it was ready\n{self.errors()}")

    def errors(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_text("utf-8", "replace")

    def signal(self, number: int) -> None:
        """Send a signal to the server only."""
        self.process.send_signal(number)

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        return self.process.wait(timeout)

    def close(self) -> int:
        """Stop it in order, if it still runs, and return its exit status; kill it if it does not stop."""
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
            return self.wait()
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            if self.process.stdout is not None:
                self.process.stdout.close()
            if self._admin_folder is not None:
                self._admin_folder.cleanup()

    # --- processes ---------------------------------------------------------------------------------

    def children(self) -> list[Process]:
        """All processes below the server. Needs psutil."""
        found: list[Process] = import_psutil().Process(self.process.pid).children(recursive=True)
        return found

    def workers(self) -> list[Process]:
        """Its worker processes. Needs psutil."""
        gone = import_psutil().NoSuchProcess
        found = []
        for process in self.children():
            with suppress(gone):
                if "ullm.worker.main" in process.cmdline():
                    found.append(process)
        return found

    # --- requests ----------------------------------------------------------------------------------

    def request(
        self, method: str, path: str, body: object = None, *, headers: Mapping[str, str] = {}
    ) -> tuple[int, Any]:
        """One request, and its answer's status and JSON (text where it is none).

        Goes to the admin socket for paths under ``/admin``, ``/sleep`` and ``/wake`` where there is one.
        """
        connection = self._connect(path)
        try:
            sent = None if body is None else json.dumps(body)
            named = {"Content-Type": "application/json", **headers} if sent is not None else dict(headers)
            connection.request(method, path, sent, named)
            answer = connection.getresponse()
            return answer.status, _content(answer.read())
        finally:
            connection.close()

    # --- inside ------------------------------------------------------------------------------------

    @property
    def _admin_socket(self) -> str | None:
        return None if self._admin_folder is None else f"{self._admin_folder.name}/admin"

    def _admin_options(self) -> Sequence[str]:
        return ("--admin-listen", f"unix:{self._admin_socket}") if self._admin_socket else ()

    def _connect(self, path: str) -> http.client.HTTPConnection:
        if self._admin_socket is not None and path.startswith(ADMIN_PATHS):
            return UnixConnection(self._admin_socket)
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return http.client.HTTPConnection(host, int(port), timeout=ANSWER_SECONDS)

    def _read(self) -> None:
        assert self.process.stdout is not None, "it is a pipe"
        for line in self.process.stdout:
            self.said += line
            if line.startswith("ready: "):
                self.url = line.split()[1].removesuffix("/v1")
                self._ready.set()
        self._ready.set()


class ServerFaults:
    """A server's fault injector, over its admin endpoints; used as a `FaultInjector` is."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._last = FaultReport([], [])

    def arm(self, plan: str) -> FaultReport:
        """Add a plan to what is armed; its hits are counted from now on.

        Raises:
            ServerFailed: the server refuses it; says why.
        """
        return self._request("POST", {"plan": plan})

    def clear(self) -> FaultReport:
        """Disarm everything; the history stays."""
        return self._request("DELETE")

    def describe(self) -> FaultReport:
        """All that is armed, and all that has happened; of a server that has ended, what was last known."""
        if self._server.process.poll() is None:
            self._last = self._request("GET")
        return self._last

    def _request(self, method: str, body: object = None) -> FaultReport:
        status, answer = self._server.request(method, "/admin/faults", body)
        if status != 200:
            raise ServerFailed(f"{method} /admin/faults: {status} {answer}")
        return msgspec.convert(answer, FaultReport)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ADMIN_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Called by the first request."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _content(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")
