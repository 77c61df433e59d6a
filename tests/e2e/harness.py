"""Servers in processes of their own, and streams read from them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest
from reading import Stream, streams, texts

__all__ = ["SCRIPTED", "Server", "Stream", "eventually", "is_gone", "streams", "texts"]

START_SECONDS = 60.0
SCRIPTED = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")
"""Options that serve `scripted_model`."""

UNCLEAN = re.compile(
    r"Traceback|never awaited|[Uu]nraisable|Exception ignored|ResourceWarning|RuntimeWarning"
)
"""What no log may say, whatever was done to the server."""


class Server:
    """A server in a process of its own, with its own folder for temporary files.

    Clients are told not to verify certificates: there are none, and to load the system's takes 30 ms.

    Args:
        arguments: after ``ullm serve --port 0``.
        environ: variables beside this process's own.
        wait: until it is ready.
        command: another way to start it.
        ready: finds the address in what such a command writes.
    """

    def __init__(
        self,
        *arguments: str,
        environ: Mapping[str, str] = {},
        wait: bool = True,
        command: Sequence[str] | None = None,
        ready: str = r"(?m)^ready: (\S+)/v1",
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ullm-e2e-"))
        (self.folder / "tmp").mkdir()
        self.url = self.said = self._errors = ""
        self._is_ready = False
        self._ready = re.compile(ready)
        self._heard = threading.Condition()
        own = [sys.executable, "-m", "ullm", "serve", "--port", "0"]
        variables = {"PYTHONWARNINGS": "default", "TMPDIR": self._temporary}
        variables["ULLM_ADMIN_LISTEN"] = f"unix:{self._socket}"
        self.process = subprocess.Popen(
            command or [*own, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **variables, **environ},
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=self._read, args=[pipe], daemon=True) for pipe in self._pipes
        ]
        for reader in self._readers:
            reader.start()
        if wait:
            self.wait_ready()

    # --- what it says ----------------------------------------------------------------------------------

    def errors(self) -> str:
        """What it wrote to stderr."""
        return self._errors

    def hear(self, pattern: str, seconds: float = 20) -> str:
        """Wait until what it wrote to stderr contains a pattern, and return what was found."""
        with self._heard:
            assert self._heard.wait_for(lambda: self._found(pattern) or self._ended, seconds), self._errors
        found = re.search(pattern, self._errors)
        assert found, f"ended without {pattern!r}\n{self._errors}"
        return found[0]

    def wait_ready(self) -> None:
        """Wait until it serves; fail with the log if it ends before."""
        with self._heard:
            ready = self._heard.wait_for(lambda: self._is_ready or self._ended, START_SECONDS)
        assert ready, f"not ready after {START_SECONDS} s\n{self._errors}"
        assert self._is_ready, f"ended before it was ready\n{self._errors}"

    @property
    def _pipes(self) -> list[IO[str]]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        return [self.process.stdout, self.process.stderr]

    @property
    def _ended(self) -> bool:
        return not any(reader.is_alive() for reader in self._readers[1:])

    def _found(self, pattern: str) -> bool:
        return re.search(pattern, self._errors) is not None

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            with self._heard:
                if pipe is self.process.stdout:
                    self.said += line
                else:
                    self._errors += line
                if found := self._ready.search(line):
                    self.url, self._is_ready = found[1], True
                self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    # --- asking it -------------------------------------------------------------------------------------

    def client(self, **options: Any) -> httpx.Client:
        """A plain HTTP client."""
        return httpx.Client(base_url=self.url, timeout=60, verify=False, **options)

    def get(self, path: str) -> httpx.Response:
        """One request on a connection of its own."""
        return httpx.get(f"{self.url}{path}", timeout=30, verify=False)

    def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """One request to the admin listener."""
        with httpx.Client(
            transport=httpx.HTTPTransport(verify=False, uds=self._socket), timeout=60
        ) as client:
            return client.request(method, f"http://localhost{path}", json=body)

    def complete(self, **body: Any) -> httpx.Response:
        """One completion that is not streamed."""
        body = {"prompt": [300, 301], "temperature": 0, "ignore_eos": True, **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, verify=False)

    def metric(self, sample: str) -> float:
        """The value of a sample of ``/metrics``, such as ``name_total`` or ``name{label="x"}``."""
        found = re.search(rf"(?m)^{re.escape(sample)} (\S+)$", self.get("/metrics").text)
        assert found, f"no sample {sample}"
        return float(found[1])

    def state(self) -> str:
        """The engine's state, as ``/health`` has it."""
        found: str = self.get("/health").json()["state"]
        return found

    def wait_state(self, *states: str, seconds: float = 20) -> None:
        """Wait for one of these states."""
        eventually(lambda: self.state() in states, seconds)

    def find_url(self) -> None:
        """Learn the address while it starts, which it says only when it is ready."""
        eventually(self._listening_ports)
        self.url = f"http://127.0.0.1:{self._listening_ports()[0]}"

    def _listening_ports(self) -> list[int]:
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return [connection.laddr.port for connection in found if connection.status == psutil.CONN_LISTEN]

    # --- its processes ---------------------------------------------------------------------------------

    def children(self) -> list[psutil.Process]:
        """All processes below the server."""
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, in service or standing by."""
        return [p for p in self.children() if not is_gone(p) and "ullm.worker.main" in _command(p)]

    def worker(self, replica: int = 0) -> psutil.Process:
        """The worker process of a replica; the next one, if it has just been lost."""
        found: list[psutil.Process] = []

        def runs() -> bool:
            pids = self.get("/health").json()["replicas"][replica]["worker_pids"]
            found[:] = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
            return len(found) == 1 and not is_gone(found[0])

        eventually(runs)
        return found[0]

    def signal(self, number: int) -> None:
        """Send a signal to the server only."""
        self.process.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        """The exit status."""
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(2)
        return code

    # --- the end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop it in order if it still runs; kill it if it does not. A failing test shows its log."""
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
            self.wait()
        finally:
            self._orphans = self._wait_for_processes(2.0)
            for process in self._orphans:
                process.kill()
            self.wait()
            for pipe in self._pipes:
                pipe.close()
            sys.stdout.write(self._errors)

    def check_nothing_is_left(self) -> None:
        """No process, temporary file, listening socket, or sign of untidiness in the log."""
        assert not self._orphans, "processes are left"
        left = [str(path) for path in Path(self._temporary).iterdir()]
        killed = self.process.returncode < 0
        left += [self._socket] if not killed and Path(self._socket).exists() else []
        assert not left, f"files are left: {left}"
        assert not (found := UNCLEAN.search(self._errors)), f"the log says {found}"
        if self.url.startswith("http"):
            with pytest.raises(httpx.ConnectError):
                self.get("/live")
        shutil.rmtree(self.folder)

    def _wait_for_processes(self, seconds: float) -> list[psutil.Process]:
        """Those that were started by it, also where they have got another parent, and do not go away."""
        deadline = time.monotonic() + seconds
        while left := [process for process in psutil.process_iter() if self._is_ours(process)]:
            if time.monotonic() > deadline:
                return left
            time.sleep(0.01)
        return []

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return not is_gone(process) and process.environ().get("TMPDIR") == self._temporary
        except psutil.Error:  # gone meanwhile, or somebody else's
            return False

    @property
    def _temporary(self) -> str:
        return str(self.folder / "tmp")

    @property
    def _socket(self) -> str:
        return str(self.folder / "admin")


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # it has ended since
        return []


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended. An orphan stays a zombie where nobody reaps it, as in containers."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def eventually(what: Callable[[], object], seconds: float = 10) -> None:
    """Wait for something that sends no event, such as another process's end."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
