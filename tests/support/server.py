"""Servers of end-to-end tests: started, asked, stopped, and searched for what they leave behind."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.waiting import eventually
from ullm.testing.server import READY, SCRIPTED, ServerProcess

__all__ = ["SCRIPTED", "Serve", "Server", "is_gone", "starting_servers"]

UNCLEAN = re.compile(
    r"Traceback|never awaited|[Uu]nraisable|Exception ignored|ResourceWarning|RuntimeWarning"
)
"""What no log may contain, whatever was done to the server."""

WARNINGS = "default,ignore::ResourceWarning:importlib._bootstrap_external"
"""A signal may end a worker in the middle of an import, with the file of a module still open."""

ENVIRON = {"PYTHONWARNINGS": WARNINGS, "ULLM_CPU_CALIBRATION": "false"}
"""Variables of servers. After ten seconds they would measure a machine that is busy with other tests."""

EXPECTED_TRACEBACK = re.compile(r"(?m)^(\S+ warning .*)(?:\n(?!\d{4}-).*)+")
"""A warning with lines of a traceback after it, as servers write it at ``--log-level debug``."""

ORPHAN_SECONDS = 10.0

REQUESTS = ("ullm_num_requests_running", "ullm_num_requests_waiting")
"""Samples of the requests that the engine has."""


class Server(ServerProcess):
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
        ready: str = READY,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ullm-e2e-"))
        self._temporary = self.folder / "tmp"
        self._temporary.mkdir()
        self._orphans: list[psutil.Process] = []
        self._left: list[str] = []
        super().__init__(
            *arguments,
            environ={**ENVIRON, "TMPDIR": str(self._temporary), **environ},
            wait=wait,
            log=self.folder / "log",
            admin=True,
            command=command,
            ready=ready,
            new_session=True,
        )

    # --- requests --------------------------------------------------------------------------------------

    def client(self, **options: Any) -> httpx.Client:
        """Return a plain HTTP client."""
        return httpx.Client(base_url=self.url, timeout=60, verify=False, **options)

    def get(self, path: str) -> httpx.Response:
        """Send one request on a connection of its own."""
        return httpx.get(f"{self.url}{path}", timeout=60, verify=False)

    def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Send one request to the admin listener."""
        with httpx.Client(
            transport=httpx.HTTPTransport(verify=False, uds=self._admin_socket), timeout=60
        ) as client:
            return client.request(method, f"http://localhost{path}", json=body)

    def complete(self, **body: Any) -> httpx.Response:
        """Ask for one completion that is not streamed."""
        body = {"prompt": [300, 301], "temperature": 0, "ignore_eos": True, **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, verify=False)

    def metric(self, sample: str) -> float:
        """Return a sample of ``/metrics``, such as ``name_total`` or ``name{label="x"}``."""
        match = re.search(rf"(?m)^{re.escape(sample)} (\S+)$", self.get("/metrics").text)
        assert match, f"no sample {sample}"
        return float(match[1])

    def replicas(self) -> list[dict[str, Any]]:
        """Return the replicas, as ``/health`` describes them."""
        replicas: list[dict[str, Any]] = self.get("/health").json()["replicas"]
        return replicas

    def state(self) -> str:
        """Return the engine's state, as ``/health`` has it."""
        state: str = self.get("/health").json()["state"]
        return state

    def wait_state(self, *states: str) -> None:
        """Wait for one of these states."""
        eventually(lambda: self.state() in states)

    def find_url(self) -> None:
        """Learn the address while it starts, which it writes only when it is ready."""
        eventually(self._listening_ports)
        self.url = f"http://127.0.0.1:{self._listening_ports()[0]}"

    def _listening_ports(self) -> list[int]:
        connections = psutil.Process(self.process.pid).net_connections("tcp")
        return [
            connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN
        ]

    # --- its processes ---------------------------------------------------------------------------------

    def workers(self) -> list[psutil.Process]:
        """Return its worker processes, in service or standing by."""
        return [process for process in super().workers() if not is_gone(process)]

    def worker(self, replica: int = 0) -> psutil.Process:
        """Return the worker process of a replica; the next one, if it has just been lost."""
        running: list[psutil.Process] = []

        def runs() -> bool:
            pids = self.replicas()[replica]["worker_pids"]
            running[:] = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
            return len(running) == 1 and not is_gone(running[0])

        eventually(runs)
        return running[0]

    @contextmanager
    def worker_held(self, *, until: int) -> Iterator[None]:
        """Stop the only replica's worker from running until so many requests are with the engine.

        A busy machine may otherwise take longer to admit them than the first of them takes to end.
        """
        worker = self.worker()
        worker.suspend()
        try:
            yield
            eventually(lambda: sum(map(self.metric, REQUESTS)) == until)
        finally:
            worker.resume()

    # --- the end ---------------------------------------------------------------------------------------

    def close(self) -> int:
        """Stop it in order if it still runs; kill it if it does not. A failing test shows its log."""
        try:
            return super().close()
        finally:
            sys.stdout.write(self.errors())

    def _kill(self) -> None:
        self._orphans = self._wait_for_processes(ORPHAN_SECONDS)
        for process in self._orphans:
            process.kill()
        super()._kill()
        killed = self.process.returncode < 0
        socket = Path(self._admin_socket or "")
        self._left = [str(path) for path in self._temporary.iterdir()]
        self._left += [str(socket)] if not killed and socket.exists() else []

    def check_nothing_is_left(self) -> None:
        """Find processes, temporary files, a listening socket, and signs of untidiness in the log."""
        assert not self._orphans, "processes are left"
        assert not self._left, f"files are left: {self._left}"
        assert not (match := UNCLEAN.search(without_expected(self.errors()))), f"the log contains {match}"
        if self.url.startswith("http"):
            with pytest.raises(httpx.ConnectError):
                self.get("/live")
        shutil.rmtree(self.folder)

    def _wait_for_processes(self, seconds: float) -> list[psutil.Process]:
        """Return those that were started by it, also where they have another parent now, and stay."""
        deadline = time.monotonic() + seconds
        while left := [process for process in psutil.process_iter() if self._is_ours(process)]:
            if time.monotonic() > deadline:
                return left
            time.sleep(0.01)
        return []

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return not is_gone(process) and process.environ().get("TMPDIR") == str(self._temporary)
        except psutil.Error:  # gone meanwhile, or somebody else's
            return False


def without_expected(log: str) -> str:
    """Return a log without the tracebacks of what a server expects and goes on after."""
    return EXPECTED_TRACEBACK.sub(r"\1", log)


Serve = Callable[..., Server]
"""Starts a server, with the arguments of `Server`."""


@contextmanager
def starting_servers() -> Iterator[Serve]:
    """Start servers; afterwards end them, and check that nothing of them is left."""
    started: list[Server] = []

    def start(*arguments: str, **options: Any) -> Server:
        wait = options.pop("wait", True)
        server = Server(*arguments, wait=False, **options)
        started.append(server)
        if wait:
            server.wait_ready()
        return server

    try:
        yield start
    finally:
        for server in started:
            server.close()
    for server in started:
        server.check_nothing_is_left()


def is_gone(process: psutil.Process) -> bool:
    """Return whether a process has ended; where nobody reaps orphans, as in containers, they stay zombies."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
