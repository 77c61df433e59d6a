"""``ullm serve`` in a process of its own, and its admin endpoints."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from ullm.faults import FaultReport
from ullm.system.interpreter import python_command
from ullm.testing.environment import environment_for_tests
from ullm.testing.guardian import Guardian
from ullm.testing.leaks import import_psutil

if TYPE_CHECKING:
    from psutil import Process

SCRIPTED = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")
"""Options that serve a model from `write_scripted_model`."""

STEP_SECONDS = "0.005"
"""What a step of a scripted server takes: long enough for a fault to come in the middle of a stream."""

READY = r"^ready: (\S+)/v1"
"""What the server writes when it serves, and in it its address."""

START_SECONDS = 60.0
STOP_SECONDS = 30.0
ANSWER_SECONDS = 60.0
ADMIN_SECONDS = 10.0
ADMIN_PATHS = ("/admin", "/sleep", "/wake", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""How the paths of admin routes begin; a test compares them with the server's table of routes."""
HEAR_SECONDS = 60.0
POLL = 0.02
READER_SECONDS = 10.0
"""Seconds after the server's end in which what it has written is read."""


class ServerFailed(AssertionError):
    """The server did not do what a server does; the message ends with what it wrote to stderr."""


class ServerProcess:
    """A server that a test has started; a context manager that stops it. It ends with a killed test, too.

    It has more than twenty methods because it is all that a test needs of a server.

    Args:
        arguments: after ``ullm serve --port 0``.
        environ: variables beside this process's own, of which those that configure ullm are left out: they
            were exported for other servers.
        wait: until it is ready.
        log: file for its stderr.
        admin: serve the admin endpoints on a unix socket, for `request`.
        command: what to run instead of ``ullm serve --port 0``.
        ready: pattern of a line, on stdout or stderr, that says that it serves; its group is the address.
        new_session: in a session and process group of its own.

    Attributes:
        url: such as ``http://127.0.0.1:40123``; empty until it is ready.
        output: what it wrote to stdout so far.
        faults: faults to inject; needs ``admin``.

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
        command: Sequence[str] | None = None,
        ready: str = READY,
        new_session: bool = False,
    ) -> None:
        self.log = log
        self.url = self.output = self._errors = ""
        self.faults = ServerFaults(self)
        self._admin_folder = tempfile.TemporaryDirectory(prefix="ullm-") if admin else None
        own = python_command("-m", "ullm", "serve", "--port", "0")
        self.process = subprocess.Popen(
            [*(command or own), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment_for_tests(self._admin_options()) | dict(environ),
            encoding="utf-8",
            errors="replace",
            start_new_session=new_session,
        )
        self._guardian = Guardian(self.process.pid)
        self._ready = re.compile(ready)
        self._is_ready = self._has_ended = False
        self._heard = threading.Condition()
        reads = (self._read_output, self._read_errors)
        self._readers = [threading.Thread(target=read, daemon=True) for read in reads]
        for reader in self._readers:
            reader.start()
        if wait:
            try:
                self.wait_ready()
            except ServerFailed:
                self.close()
                raise

    @property
    def said(self) -> str:
        """The former name of `output`."""
        return self.output

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- life --------------------------------------------------------------------------------------

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it serves.

        Raises:
            ServerFailed: it has ended, or does not serve within `seconds` seconds.
        """
        with self._heard:
            in_time = self._heard.wait_for(lambda: self._is_ready or self._has_ended, seconds)
        if not in_time:
            raise ServerFailed(f"not ready after {seconds:g} s\n{self.errors()}")
        if not self._is_ready:
            raise ServerFailed(f"ended before it was ready\n{self.errors()}")

    def errors(self) -> str:
        """Return what it has written to stderr."""
        return self._errors

    def hear(self, pattern: str, seconds: float = HEAR_SECONDS) -> str:
        """Wait until what it has written to stderr contains a pattern, and return what matches.

        Raises:
            ServerFailed: it has ended without, or does not write it within `seconds` seconds.
        """
        with self._heard:
            self._heard.wait_for(lambda: re.search(pattern, self._errors) or self._has_ended, seconds)
        match = re.search(pattern, self._errors)
        if match is None:
            raise ServerFailed(f"has not written {pattern!r}\n{self.errors()}")
        return match[0]

    def signal(self, number: int) -> None:
        """Send a signal to the server only."""
        self.process.send_signal(number)

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        """Wait for its end, and return the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        status = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(READER_SECONDS)
        return status

    def close(self) -> int:
        """Stop it in order, if it still runs, and return its exit status; kill it if it does not stop."""
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
            return self.wait()
        finally:
            self._kill()
            self._guardian.dismiss()
            for pipe in self._pipes:
                pipe.close()
            if self._admin_folder is not None:
                self._admin_folder.cleanup()

    def reset(self) -> None:
        """Have it as it was when it was ready: nothing armed, no history, awake, nothing in flight.

        Raises:
            ServerFailed: it has ended, or is not within `START_SECONDS`.
        """
        if self.process.poll() is not None:
            raise ServerFailed(f"ended with status {self.process.returncode}\n{self.errors()}")
        if self._admin_folder is not None:
            self.faults.reset()
            self.request("POST", "/wake")
        deadline = time.monotonic() + START_SECONDS
        while not self._is_at_rest():
            if time.monotonic() > deadline:
                raise ServerFailed(f"not at rest after {START_SECONDS:g} s\n{self.errors()}")
            time.sleep(POLL)

    def _is_at_rest(self) -> bool:
        status, load = self.request("GET", "/load")
        return status == 200 and load["server_load"] == 0 and self.request("GET", "/ready")[0] == 200

    # --- processes ---------------------------------------------------------------------------------

    def children(self) -> list[Process]:
        """Return all processes below the server. Needs psutil."""
        below: list[Process] = import_psutil().Process(self.process.pid).children(recursive=True)
        return below

    def workers(self) -> list[Process]:
        """Return its worker processes, in service or standing by. Needs psutil."""
        gone = import_psutil().NoSuchProcess
        workers = []
        for process in self.children():
            with suppress(gone):
                if "ullm.worker.main" in process.cmdline():
                    workers.append(process)
        return workers

    # --- requests ----------------------------------------------------------------------------------

    def request(
        self, method: str, path: str, body: object = None, *, headers: Mapping[str, str] = {}
    ) -> tuple[int, Any]:
        """Send one request, and return its answer's status and JSON (text where it is none).

        Goes to the admin socket for paths under ``/admin``, ``/sleep`` and ``/wake`` where there is one.
        """
        connection = self._connect(path)
        try:
            content = None if body is None else json.dumps(body)
            named = {"Content-Type": "application/json", **headers} if content is not None else dict(headers)
            connection.request(method, path, content, named)
            answer = connection.getresponse()
            return answer.status, _content(answer.read())
        finally:
            connection.close()

    # --- inside ------------------------------------------------------------------------------------

    @property
    def _admin_socket(self) -> str | None:
        return None if self._admin_folder is None else f"{self._admin_folder.name}/admin"

    def _admin_options(self) -> dict[str, str]:
        return {"ULLM_ADMIN_LISTEN": f"unix:{self._admin_socket}"} if self._admin_socket else {}

    def _connect(self, path: str) -> http.client.HTTPConnection:
        if self._admin_socket is not None and path.startswith(ADMIN_PATHS):
            return UnixConnection(self._admin_socket)
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return http.client.HTTPConnection(host, int(port), timeout=ANSWER_SECONDS)

    @property
    def _pipes(self) -> list[IO[str]]:
        assert self.process.stdout is not None, "it is a pipe"
        assert self.process.stderr is not None, "it is a pipe"
        return [self.process.stdout, self.process.stderr]

    def _read_output(self) -> None:
        for line in self._pipes[0]:
            self._take(line, output=line)

    def _read_errors(self) -> None:
        with self.log.open("w", encoding="utf-8") as log:
            for line in self._pipes[1]:
                log.write(line)
                log.flush()
                self._take(line, errors=line)
        with self._heard:
            self._has_ended = True
            self._heard.notify_all()

    def _take(self, line: str, output: str = "", errors: str = "") -> None:
        with self._heard:
            self.output += output
            self._errors += errors
            if match := self._ready.search(line):
                self.url, self._is_ready = match[1], True
            self._heard.notify_all()

    def _kill(self) -> None:
        self.process.kill()
        self.wait()


class ServerFaults:
    """A server's fault injector, reached over its admin endpoints; used like a `FaultInjector`."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._last = FaultReport([], [])
        self._forgotten = 0

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
        """Return what is armed and what has fired; for a server that has ended, what was last known."""
        if self._server.process.poll() is None:
            self._last = self._request("GET")
        return self._last

    def reset(self) -> None:
        """Disarm everything, and leave out what has fired so far from now on."""
        self.clear()
        self._forgotten += len(self.describe().fired)
        self.describe()

    def _request(self, method: str, body: object = None) -> FaultReport:
        status, answer = self._server.request(method, "/admin/faults", body)
        if status != 200:
            raise ServerFailed(f"{method} /admin/faults: {status} {answer}")
        report = msgspec.convert(answer, FaultReport)
        return FaultReport(report.armed, report.fired[self._forgotten :])


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ADMIN_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connect; the first request does."""
        if sys.platform == "win32":
            raise OSError("Python has no unix sockets on Windows")
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _content(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")
