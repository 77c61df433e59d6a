"""The pytest plugin: fixtures for tests in which things go wrong; see docs/how-to/fault-injection.md.

pytest imports this module in every project that has ullm installed, so nothing else is imported here
until a fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trio.testing import MockClock

    from ullm.engine import Engine
    from ullm.testing.control import FaultControl
    from ullm.testing.leaks import LeakCheck
    from ullm.testing.server import ServerProcess

    OpenEngine = Callable[..., AbstractAsyncContextManager[Engine]]
    OpenServer = Callable[..., ServerProcess]

STEP_SECONDS = "0.005"
"""What a step of a scripted server takes: long enough for a fault to come in the middle of a stream."""


@pytest.fixture(scope="session")
def ullm_scripted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model that follows a script: it starts at once, without torch; its tokens are predictable."""
    from ullm.testing.models import write_scripted_model

    return write_scripted_model(tmp_path_factory.mktemp("ullm-scripted"))


@pytest.fixture(scope="session")
def ullm_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a real Llama of two layers with random weights."""
    from ullm.testing.models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("ullm-tiny"))


@pytest.fixture
def ullm_clock() -> MockClock:
    """Return a virtual clock. pytest-trio runs the test on it if the test itself asks for this fixture."""
    from ullm.testing.clock import virtual_clock

    return virtual_clock()


@pytest.fixture
def ullm_no_leaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LeakCheck]:
    """Fail a test that leaves a process, shared memory, a temporary file, a socket or a descriptor behind.

    Needs psutil. Ask for it first, so that it looks last.
    """
    from ullm.testing.leaks import LeakCheck, temporary_folder

    folder = tmp_path_factory.mktemp("ullm-tmp")
    with temporary_folder(folder):
        check = LeakCheck(folder)
        yield check
        check.check()


@pytest.fixture
def ullm_faults() -> FaultControl:
    """Return the faults of this test: ``ullm_faults.arm("worker.step:crash@nth=3")``.

    Armed in every engine and server that the test's factories have opened, and will open.
    """
    from ullm.testing.control import FaultControl

    return FaultControl()


@pytest.fixture
def ullm_engine(ullm_scripted_model: Path, ullm_faults: FaultControl) -> OpenEngine:
    """Open engines with workers in memory: ``async with ullm_engine(step_seconds=1.0) as engine``.

    Args of what it returns: as `ullm.testing.open_scripted_engine`, the model aside.
    """
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def open_it(**options: Any) -> Any:
        from ullm.testing.engine import open_scripted_engine

        options["faults"] = ullm_faults.plan_with(options.get("faults", ""))
        async with open_scripted_engine(ullm_scripted_model, **options) as engine:
            with ullm_faults.also_in(engine.faults):
                yield engine

    return open_it


@pytest.fixture
def ullm_server(
    ullm_no_leaks: LeakCheck, ullm_scripted_model: Path, ullm_faults: FaultControl, tmp_path: Path
) -> Iterator[OpenServer]:
    """Start real servers: ``server = ullm_server("--max-bs", "8")``; stop them, and look for leaks.

    Args of what it returns: options of ``ullm serve``, and ``model``, a folder or name, instead of the
    scripted model; ``environ`` and ``wait`` as in `ullm.testing.ServerProcess`.
    """
    from contextlib import ExitStack

    from ullm.testing.server import SCRIPTED, ServerProcess

    with ExitStack() as servers:
        count = 0

        def start(*arguments: str, model: Path | str | None = None, **options: Any) -> ServerProcess:
            nonlocal count
            count += 1
            script = SCRIPTED if model is None else ()
            environ = {"ULLM_SCRIPTED_STEP_SECONDS": STEP_SECONDS, **options.pop("environ", {})}
            environ["ULLM_FAULTS"] = ullm_faults.plan_with(environ.get("ULLM_FAULTS", ""))
            server = ServerProcess(
                "--model",
                str(model or ullm_scripted_model),
                *script,
                *arguments,
                environ=environ,
                log=tmp_path / f"server{count}.log",
                admin=True,
                **options,
            )
            servers.enter_context(server)
            servers.enter_context(ullm_faults.also_in(server.faults))
            return server

        yield start
