"""``hypercorn ullm.app:app`` with both worker classes, and the ASGI callable by itself."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
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
from tests.support.server import Server, starting_servers
from tests.support.streams import Stream, texts, wait_begun
from tests.support.waiting import eventually
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


def start(worker: str, model: Path, *, wait: bool = True, **environ: str) -> dict[str, Any]:
    """Return arguments of a `Server` that run Hypercorn."""
    variables = {"ULLM_MODEL": str(model), "ULLM_RUNNER": "ullm.testing:ScriptedRunner", **environ}
    command = [sys.executable, "-m", "hypercorn", "-k", worker, "-b", "127.0.0.1:0", "ullm.app:app"]
    return {"command": command, "environ": variables, "ready": r"Running on (http://\S+)", "wait": wait}


@contextmanager
def hypercorn(worker: str, model: Path, **environ: str) -> Iterator[Server]:
    with starting_servers() as serve:
        yield serve(**start(worker, model, **environ))


def begun(server: Server, max_tokens: int) -> Stream:
    (stream,) = wait_begun([Stream(server, max_tokens)])
    return stream


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_it_serves_and_drains(worker: str, model: Path) -> None:
    """After SIGTERM the running stream ends normally, newcomers get 503, and nothing is left behind."""
    with hypercorn(worker, model) as server:
        pids = server.replicas()[0]["worker_pids"]
        assert all(psutil.pid_exists(pid) for pid in pids)
        assert server.complete(max_tokens=5).json()["usage"]["completion_tokens"] == 5
        assert server.complete(prompt=5).status_code == 400
        stream = begun(server, 150)
        server.signal(signal.SIGTERM)
        eventually(lambda: server.get("/ready").status_code == 503)
        late = server.complete()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        texts([stream])
        assert server.wait() == 0
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert "1 drained, 0 aborted, 0 killed, 0 abandoned" in server.errors()


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_the_deadline_aborts_with_a_final_event(worker: str, model: Path) -> None:
    """The signal goes to the whole process group, as a terminal or an init system may send it."""
    with hypercorn(worker, model, ULLM_SHUTDOWN_TIMEOUT="3.3") as server:
        stream = begun(server, 3000)
        os.killpg(server.process.pid, signal.SIGTERM)
        assert stream.join().finish_reason == "abort"
        assert stream.done
        server.wait()
        assert "1 aborted" in server.errors()


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_a_start_that_fails_is_one_line_and_not_a_server(worker: str, tmp_path: Path) -> None:
    """Hypercorn adds a traceback of its own, and ends with code 0 whatever happened."""
    server = Server(**start(worker, tmp_path / "missing", wait=False))
    try:
        server.hear(r"ullm\.hosting\.asgi .*missing: no such folder")
        server.wait()
        assert "Lifespan failure in startup" in server.errors()
    finally:
        server.close()
        shutil.rmtree(server.folder)


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_a_disconnect_frees_the_request(worker: str, model: Path) -> None:
    with hypercorn(worker, model) as server:
        stream = begun(server, 4000)
        assert server.metric("ullm_num_requests_running") == 1
        stream.leave()
        eventually(lambda: server.metric("ullm_num_requests_running") == 0)
        assert 'finish_reason="abort"} 1.0' in server.get("/metrics").text


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_an_admin_shutdown_ends_the_command(worker: str, model: Path) -> None:
    """Over the admin listener, which needs no key. Hypercorn's parent does not replace the worker."""
    with hypercorn(worker, model) as server:
        assert httpx.post(f"{server.url}/admin/shutdown").status_code == 403
        assert server.admin("GET", "/health").json()["state"] == "running"
        stream = begun(server, 100)
        server.admin("POST", "/admin/shutdown")
        texts([stream])
        assert server.wait() == 0
        assert "by admin: 1 drained" in server.errors()


@pytest.mark.process
@pytest.mark.parametrize("worker", WORKERS)
def test_a_hangup_of_the_worker_reloads(worker: str, model: Path) -> None:
    with hypercorn(worker, model) as server:
        before = server.replicas()[0]["worker_pids"]
        (child,) = {psutil.Process(pid).ppid() for pid in before}
        stream = begun(server, 200)
        os.kill(child, signal.SIGHUP)
        texts([stream])
        eventually(lambda: server.replicas()[0]["worker_pids"] != before)
        eventually(lambda: 'outcome="succeeded"} 1.0' in server.get("/metrics").text)


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
