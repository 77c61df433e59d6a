"""``ullm.app`` below servers and applications that are not Hypercorn's command; their process is theirs."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hypercorn.asyncio
import hypercorn.trio
import pytest
import trio
from hypercorn.app_wrappers import ASGIWrapper

from tests.hosting.test_asgi import Lifespan, get, missing, scripted
from tests.support.server import starting_servers
from tests.support.streams import Stream, texts, wait_begun
from ullm.app import App
from ullm.errors import ModelNotFound
from ullm.hosting.hypercorn import is_command, serves
from ullm.hosting.process_settings import settings_of_the_process
from ullm.testing import write_scripted_model

SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("models") / "scripted", step_seconds=0.01)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


# --- who serves ----------------------------------------------------------------------------------------


async def test_trio_server_that_is_not_hypercorn(model: Path) -> None:
    """Although Hypercorn is imported, as Quart does, signal handlers stay; the lifespan ends the engine."""
    module = importlib.import_module("hypercorn.trio.run")
    before, function = handlers(), module.raise_shutdown
    app, lifespan = App(partial(scripted, model)), Lifespan(trio.Event)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app, {"type": "lifespan"}, lifespan.receive, lifespan.send)
        await lifespan.started.wait()
        assert (await get(app, "/ready", trio.sleep_forever))[0] == 200
        assert (handlers(), module.raise_shutdown) == (before, function)
        lifespan.stop.set()
    assert lifespan.answers[-1] == {"type": "lifespan.shutdown.complete"}


def test_asyncio_server_that_is_not_hypercorn(model: Path) -> None:
    """`asyncio.run` installs a handler of its own for SIGINT, which stays as well."""

    async def main() -> None:
        module = importlib.import_module("hypercorn.asyncio.run")
        before, function = handlers(), module.raise_shutdown
        app, lifespan = App(partial(scripted, model)), Lifespan(asyncio.Event)
        task = asyncio.create_task(app({"type": "lifespan"}, lifespan.receive, lifespan.send))
        await lifespan.started.wait()
        assert (await get(app, "/ready", asyncio.Event().wait))[0] == 200
        assert (handlers(), module.raise_shutdown) == (before, function)
        lifespan.stop.set()
        await task
        assert lifespan.answers[-1] == {"type": "lifespan.shutdown.complete"}

    asyncio.run(main())


class Told:
    """An application that notes in its lifespan whether Hypercorn serves, and whether it is the command."""

    def __init__(self, event: Callable[[], Any]) -> None:
        self.told: tuple[bool, bool] | None = None
        self.noted = event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for answer in ("startup", "shutdown"):
            await receive()
            self.told = serves(), is_command()
            self.noted.set()
            await send({"type": f"lifespan.{answer}.complete"})

    async def wait(self) -> None:
        await self.noted.wait()


def config() -> Any:
    result = hypercorn.Config()
    result.bind, result.errorlog = ["127.0.0.1:0"], None
    return result


@pytest.mark.process
@pytest.mark.parametrize("command", [True, False])
def test_hypercorn_on_asyncio_is_recognized(command: bool) -> None:
    async def main(app: Told) -> None:
        await hypercorn.asyncio.serve(app, config(), shutdown_trigger=app.wait, mode="asgi")

    async def both() -> Told:
        app = Told(asyncio.Event)
        assert (serves(), is_command()) == (False, False)
        await main(app)
        return app

    if command:
        module = importlib.import_module("hypercorn.asyncio.run")
        app = Told(asyncio.Event)
        asyncio.run(module.worker_serve(ASGIWrapper(app), config(), shutdown_trigger=app.wait))
    else:
        app = asyncio.run(both())
    assert app.told == (True, command)


@pytest.mark.process
@pytest.mark.parametrize("command", [True, False])
def test_hypercorn_on_trio_is_recognized(command: bool) -> None:
    async def main(app: Told) -> None:
        assert (serves(), is_command()) == (False, False)
        await hypercorn.trio.serve(app, config(), shutdown_trigger=app.wait, mode="asgi")

    app = Told(trio.Event)
    if command:
        module = importlib.import_module("hypercorn.trio.run")
        trio.run(partial(module.worker_serve, ASGIWrapper(app), config(), shutdown_trigger=app.wait))
    else:
        trio.run(main, app)
    assert app.told == (True, command)


async def test_an_admin_shutdown_leaves_the_server_alone(model: Path) -> None:
    """The engine stops; the process, which may do other things, goes on without a watchdog."""
    app, lifespan = App(partial(scripted, model)), Lifespan(trio.Event)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app, {"type": "lifespan"}, lifespan.receive, lifespan.send)
        await lifespan.started.wait()
        hosted = app._hosted
        assert hosted is not None
        hosted.shutdown(None)
        await hosted.host.engine.wait_stopped()
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}
        assert (await get(app, "/ready", trio.sleep_forever))[0] == 503
        lifespan.stop.set()


# --- mounted, without a lifespan -----------------------------------------------------------------------


async def test_without_a_lifespan_answer_and_log_say_so(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ullm").propagate = True
    app = App(missing)
    for _ in range(3):
        status, body = await get(app, "/ready", trio.sleep_forever)
        assert (status, body["error"]["code"]) == (503, "no_lifespan")
        assert "lifespan=ullm.app.app.lifespan" in body["error"]["message"]
    (record,) = [record for record in caplog.records if record.name == "ullm.hosting.asgi"]
    assert "does not run its lifespan" in record.getMessage()


async def test_an_outer_lifespan_in_trio(model: Path) -> None:
    app = App(partial(scripted, model))
    for _ in range(2):
        async with app.lifespan():
            assert (await get(app, "/ready", trio.sleep_forever))[0] == 200
        assert (await get(app, "/ready", trio.sleep_forever))[1]["error"]["code"] == "not_ready"
    with pytest.raises(RuntimeError, match=r"^the outer program's own$"):
        async with app.lifespan("the outer application"):
            raise RuntimeError("the outer program's own")
    with pytest.raises(ModelNotFound):
        async with App(missing).lifespan():
            raise AssertionError("not reached")


def test_an_outer_lifespan_in_asyncio(model: Path) -> None:
    async def main() -> None:
        app = App(partial(scripted, model))
        async with app.lifespan():
            assert (await get(app, "/ready", asyncio.Event().wait))[0] == 200
        assert (await get(app, "/ready", asyncio.Event().wait))[1]["error"]["code"] == "not_ready"
        with pytest.raises(RuntimeError, match=r"^the outer program's own$"):
            async with app.lifespan("the outer application"):
                raise RuntimeError("the outer program's own")
        with pytest.raises(ModelNotFound):
            async with App(missing).lifespan():
                raise AssertionError("not reached")

    asyncio.run(main())


# --- settings of the process ---------------------------------------------------------------------------


@contextmanager
def unconfigured() -> Iterator[logging.Logger]:
    """The logger of ullm as it is in a program that configures no logging; not a fixture, because pytest
    gives the root logger its handlers after those."""
    logger, root = logging.getLogger("ullm"), logging.getLogger()
    before = list(logger.handlers), list(root.handlers), logger.level, logger.propagate, gc.get_threshold()
    logger.handlers[:], root.handlers[:] = [logging.NullHandler()], []
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    gc.set_threshold(700, 10, 10)
    try:
        yield logger
    finally:
        logger.handlers[:], root.handlers[:] = before[0], before[1]
        logger.setLevel(before[2])
        logger.propagate = before[3]
        gc.set_threshold(*before[4])


def test_a_program_without_settings_gets_ours_for_the_time() -> None:
    with unconfigured() as logger:
        with settings_of_the_process("warning"):
            assert logger.level == logging.WARNING
            assert gc.get_threshold()[0] > 2000
        assert gc.get_threshold() == (700, 10, 10)
        with settings_of_the_process("error"):  # a second lifespan is not taken for the program's own
            assert logger.level == logging.ERROR


def test_settings_of_the_program_stay() -> None:
    with unconfigured() as logger:
        own = logging.StreamHandler()
        logging.getLogger().addHandler(own)
        gc.set_threshold(5000, 7, 7)
        with settings_of_the_process("warning"):
            assert (logger.level, logger.propagate) == (logging.NOTSET, True)
            assert gc.get_threshold() == (5000, 7, 7)
        logger.setLevel(logging.INFO)
        logging.getLogger().removeHandler(own)
        with settings_of_the_process("warning"):
            assert logger.level == logging.INFO


def test_a_threshold_that_the_program_sets_meanwhile_stays() -> None:
    with unconfigured(), settings_of_the_process("warning"):
        gc.set_threshold(900)
        with settings_of_the_process("warning"):
            pass
        assert gc.get_threshold()[0] == 900


# --- a real server -------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_uvicorn_stops_and_drains(number: signal.Signals, model: Path) -> None:
    pytest.importorskip("uvicorn")
    with starting_servers() as serve:
        server = serve(
            command=[sys.executable, "-m", "uvicorn", "--port", "0", "ullm.app:app"],
            environ={"ULLM_MODEL": str(model), "ULLM_RUNNER": "ullm.testing:ScriptedRunner"},
            ready=r"running on (http://\S+)",
        )
        (stream,) = wait_begun([Stream(server, 100)])
        server.signal(number)
        texts([stream])
        server.wait()
        assert "0 aborted, 0 killed, 0 abandoned" in server.errors()


@pytest.mark.process
@pytest.mark.slow
def test_mounted_in_starlette(model: Path) -> None:
    """With and without a lifespan; the program's logging and garbage collection stay, and a stop drains."""
    pytest.importorskip("starlette")
    with starting_servers() as serve:
        server = serve(
            command=[
                *(sys.executable, "-m", "hypercorn", "-b", "127.0.0.1:0"),
                "tests.hosting.outer_program:app",
            ],
            environ={"ULLM_MODEL": str(model), "ULLM_RUNNER": "ullm.testing:ScriptedRunner"},
            ready=r"Running on (http://\S+)",
        )
        assert server.get("/threshold").text == "(5000, 7, 7)"
        forgotten = server.get("/forgotten/ready")
        assert (forgotten.status_code, forgotten.json()["error"]["code"]) == (503, "no_lifespan")
        assert "retry-after" not in forgotten.headers
        (stream,) = wait_begun([Stream(server, 100)])
        server.signal(signal.SIGTERM)
        texts([stream])
        assert server.wait() == 0
        assert "OUTER ullm.engine.stop" in server.errors()
        assert server.errors().count("OUTER ullm.hosting.asgi the engine was never started") == 1
