"""``hypercorn ullm.app:app`` with both worker classes, and the ASGI callable by itself."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio

import ullm.app
from ullm.config import EngineConfig, ServerConfig
from ullm.engine import open_engine
from ullm.errors import ModelNotFound
from ullm.testing import write_scripted_model

WORKERS = (pytest.param("asyncio", marks=pytest.mark.slow), "trio")
"""In the fast tier trio only: tests/e2e/test_hosted.py has asyncio there, and trio in the slow one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("models") / "scripted", step_seconds=0.01)


# --- the real command --------------------------------------------------------------------------


class Server:
    """A running ``hypercorn`` command."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, pattern: str) -> str:
        while (line := self._lines.get(timeout=30)) is not None:
            self.log.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError("".join(self.log))

    def end(self) -> int:
        """The exit code, when it ends by itself."""
        code = self.process.wait(30)
        self._reader.join(10)
        while (line := self._lines.get()) is not None:
            self.log.append(line)
        return code


@contextmanager
def hypercorn(worker: str, model: Path, *options: str, **environ: str) -> Iterator[Server]:
    variables = {
        **os.environ,
        "ULLM_MODEL": str(model),
        "ULLM_RUNNER": "ullm.testing:ScriptedRunner",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **environ,
    }
    command = [sys.executable, "-m", "hypercorn", "-k", worker, "-b", "127.0.0.1:0", *options, "ullm.app:app"]
    process = subprocess.Popen(
        command, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    server = Server(process)
    try:
        yield server
    finally:
        if process.poll() is None:  # in order, so that Hypercorn takes its semaphores with it
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        server._reader.join(10)
        assert process.stderr is not None
        process.stderr.close()


def running_on(server: Server) -> str:
    return server.wait_for(r"Running on (http://\S+)")


def stream(url: str, on_first: Callable[[], object], **body: Any) -> list[Any]:
    """The events of a streamed completion; calls ``on_first`` when it has begun."""
    events: list[Any] = []
    asked = {"prompt": "hello", "stream": True, "ignore_eos": True, "temperature": 0, **body}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=30) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line:
                continue
            events.append(line.removeprefix("data: "))
            if len(events) == 1:
                on_first()
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_it_serves_and_drains(worker: str, model: Path) -> None:
    """After SIGTERM the running stream ends normally, newcomers get 503, and nothing is left behind."""
    late: list[httpx.Response] = []
    with hypercorn(worker, model) as server:
        url = running_on(server)
        pids = httpx.get(f"{url}/health").json()["replicas"][0]["worker_pids"]
        assert all(psutil.pid_exists(pid) for pid in pids)

        def stop_and_knock() -> None:
            server.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/ready").status_code == 200:
                pass
            late.append(httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}))

        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "hi", "max_tokens": 5})
        assert answer.json()["usage"]["completion_tokens"] == 5
        assert httpx.post(f"{url}/v1/completions", json={"prompt": 5}).status_code == 400
        events = stream(url, stop_and_knock, max_tokens=150, stream_options={"include_usage": True})
        assert events[-1]["usage"]["completion_tokens"] == 150
        assert events[-2]["choices"][0]["finish_reason"] == "length"
        assert late[0].status_code == 503
        assert late[0].json()["error"]["code"] == "draining"
        assert server.end() == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert "1 drained, 0 aborted, 0 killed, 0 abandoned" in "".join(server.log)


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_the_deadline_aborts_with_a_final_event(worker: str, model: Path) -> None:
    """The signal goes to the whole process group, as a terminal or an init system may send it."""
    with hypercorn(worker, model, ULLM_SHUTDOWN_TIMEOUT="3.3") as server:
        url = running_on(server)
        events = stream(url, lambda: os.killpg(server.process.pid, signal.SIGTERM), max_tokens=3000)
        assert events[-1]["choices"][0]["finish_reason"] == "abort"
        server.end()
    assert "1 aborted" in "".join(server.log)


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_a_start_that_fails_is_one_line_and_not_a_server(worker: str, tmp_path: Path) -> None:
    """Hypercorn adds a traceback of its own, and ends with code 0 whatever happened."""
    with hypercorn(worker, tmp_path / "missing") as server:
        assert "missing: no such folder" in server.wait_for("(ullm.app .*)")
        server.end()
    assert "Lifespan failure in startup" in "".join(server.log)


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_a_disconnect_frees_the_request(worker: str, model: Path) -> None:
    with hypercorn(worker, model) as server:
        url = running_on(server)
        asked = {"prompt": "hello", "stream": True, "ignore_eos": True, "max_tokens": 4000}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            assert _running(url) == 1
        while _running(url):
            pass
        assert 'finish_reason="abort"} 1.0' in httpx.get(f"{url}/metrics").text


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_an_admin_shutdown_ends_the_command(worker: str, model: Path, tmp_path: Path) -> None:
    """Over the admin listener, which needs no key. Hypercorn's parent does not replace the worker."""
    path = tmp_path / "admin.sock"
    with hypercorn(worker, model, ULLM_ADMIN_LISTEN=f"unix:{path}") as server:
        url = running_on(server)
        assert httpx.post(f"{url}/admin/shutdown").status_code == 403
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as admin:
            assert admin.get("/health").json()["state"] == "running"
            events = stream(url, lambda: admin.post("/admin/shutdown"), max_tokens=100)
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0
    assert "by admin: 1 drained" in "".join(server.log)
    assert not path.exists()


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_a_hangup_of_the_worker_reloads(worker: str, model: Path) -> None:
    with hypercorn(worker, model) as server:
        url = running_on(server)
        before = httpx.get(f"{url}/health").json()["replicas"][0]["worker_pids"]
        (child,) = {psutil.Process(pid).ppid() for pid in before}
        events = stream(url, lambda: os.kill(child, signal.SIGHUP), max_tokens=200)
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        deadline = time.monotonic() + 30
        while httpx.get(f"{url}/health").json()["replicas"][0]["worker_pids"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert 'outcome="succeeded"} 1.0' in httpx.get(f"{url}/metrics").text


def _running(url: str) -> float:
    found = re.search(r"^ullm_num_requests_running (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


# --- the callable ------------------------------------------------------------------------------


def test_importing_it_starts_nothing() -> None:
    code = (
        "import ullm.app, sys, threading\n"
        "print(sorted({'torch', 'quart', 'ullm.engine'} & set(sys.modules)), threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "1"]


@asynccontextmanager
async def scripted(model: Path) -> AsyncIterator[Any]:
    config = EngineConfig(model=str(model), runner="ullm.testing:ScriptedRunner", transport="thread")
    async with open_engine(config) as engine:
        yield engine, ServerConfig()


@asynccontextmanager
async def missing() -> AsyncIterator[Any]:
    await trio.lowlevel.checkpoint()
    raise ModelNotFound("no model of that name\nanywhere")
    yield


class Lifespan:
    """A server's side of a lifespan, on asyncio or trio."""

    def __init__(self, event: Callable[[], Any]) -> None:
        self.answers: list[Any] = []
        self.started, self.stop = event(), event()
        self._asked = 0

    async def receive(self) -> Any:
        self._asked += 1
        if self._asked == 1:
            return {"type": "lifespan.startup"}
        await self.stop.wait()
        return {"type": "lifespan.shutdown"}

    async def send(self, message: Any) -> None:
        self.answers.append(message)
        self.started.set()


async def get(app: ullm.app.App, path: str, wait_for_ever: Callable[[], Any]) -> tuple[int, Any]:
    """One GET, as a server would call it."""
    sent: list[Any] = []
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if asked:
            await wait_for_ever()
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"x")],
    }
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


async def test_a_lifespan_in_trio(model: Path) -> None:
    app = ullm.app.App(partial(scripted, model))
    lifespan = Lifespan(trio.Event)
    assert (await get(app, "/live", trio.sleep_forever))[0] == 503
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app, {"type": "lifespan"}, lifespan.receive, lifespan.send)
        await lifespan.started.wait()
        assert await get(app, "/ready", trio.sleep_forever) == (200, {"status": "ready", "state": "running"})
        lifespan.stop.set()
    assert [answer["type"] for answer in lifespan.answers] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    status, body = await get(app, "/live", trio.sleep_forever)
    assert (status, body["error"]["code"]) == (503, "not_ready")


def test_a_lifespan_in_asyncio(model: Path) -> None:
    async def main() -> None:
        app = ullm.app.App(partial(scripted, model))
        for _ in range(2):  # an app may have one lifespan after another
            lifespan = Lifespan(asyncio.Event)
            task = asyncio.create_task(app({"type": "lifespan"}, lifespan.receive, lifespan.send))
            await lifespan.started.wait()
            answers = await asyncio.gather(*(get(app, "/ready", asyncio.Event().wait) for _ in range(20)))
            assert answers == [(200, {"status": "ready", "state": "running"})] * 20
            lifespan.stop.set()
            await task
            assert lifespan.answers[-1] == {"type": "lifespan.shutdown.complete"}
            assert (await get(app, "/live", asyncio.Event().wait))[0] == 503

    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "ullm-trio"]


async def test_a_failed_start_in_trio() -> None:
    lifespan = Lifespan(trio.Event)
    await ullm.app.App(missing)({"type": "lifespan"}, lifespan.receive, lifespan.send)
    assert lifespan.answers == [
        {"type": "lifespan.startup.failed", "message": "no model of that name anywhere"}
    ]


def test_a_failed_start_in_asyncio() -> None:
    async def main() -> None:
        lifespan = Lifespan(asyncio.Event)
        await ullm.app.App(missing)({"type": "lifespan"}, lifespan.receive, lifespan.send)
        assert lifespan.answers == [
            {"type": "lifespan.startup.failed", "message": "no model of that name anywhere"}
        ]

    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "ullm-trio"]


def test_the_death_of_the_trio_thread_is_answered(model: Path) -> None:
    async def main() -> None:
        app = ullm.app.App(partial(scripted, model))
        lifespan = Lifespan(asyncio.Event)
        task = asyncio.create_task(app({"type": "lifespan"}, lifespan.receive, lifespan.send))
        await lifespan.started.wait()
        assert app._thread is not None
        assert await app._thread.stop_async(10)
        status, body = await get(app, "/live", asyncio.Event().wait)
        assert (status, body["error"]["code"]) == (503, "engine_dead")
        lifespan.stop.set()
        await task
        assert lifespan.answers[-1] == {"type": "lifespan.shutdown.complete"}

    asyncio.run(main())


def test_pieces_that_piled_up_are_joined() -> None:
    start = {"type": "http.response.start", "status": 200, "headers": []}
    pieces = [{"type": "http.response.body", "body": bytes([65 + n]), "more_body": n < 2} for n in range(3)]
    joined = {"type": "http.response.body", "body": b"ABC", "more_body": False}
    assert ullm.hosting.asgi._joined([start, *pieces]) == [start, joined]
