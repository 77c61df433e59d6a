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
    from ullm.testing.shared import SharedServers

    OpenEngine = Callable[..., AbstractAsyncContextManager[Engine]]
    OpenServer = Callable[..., ServerProcess]


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
def ullm_clock(request: pytest.FixtureRequest) -> MockClock:
    """Return a virtual clock. pytest-trio runs the test on it if the test itself asks for this fixture."""
    from inspect import iscoroutinefunction

    from ullm.testing.clock import virtual_clock

    if iscoroutinefunction(request.function) and request.node.get_closest_marker("trio") is None:
        pytest.fail(
            "ullm_clock: only pytest-trio runs a test on this clock, and it does not run this one: install "
            "pytest-trio, and set trio_mode = true or mark the test with @pytest.mark.trio",
            pytrace=False,
        )
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
def ullm_faults() -> Iterator[FaultControl]:
    """Return the faults of this test: ``ullm_faults.arm("worker.step:crash@nth=3")``.

    Armed in every engine and server that the test's factories have opened, and will open, and at the points
    of the test's own program. A test that would pass fails if something armed has not fired, unless
    ``ullm_faults.strict = False``; the report of one that fails says what was injected.
    """
    from ullm.faults import injected
    from ullm.testing.control import FaultControl

    with injected("") as own:
        yield FaultControl(own)


@pytest.fixture
def ullm_engine(
    ullm_scripted_model: Path, ullm_faults: FaultControl, monkeypatch: pytest.MonkeyPatch
) -> OpenEngine:
    """Open engines with workers in memory: ``async with ullm_engine(step_seconds=1.0) as engine``.

    Args of what it returns: as `ullm.testing.open_scripted_engine`, the model aside.
    """
    import os
    from contextlib import ExitStack, asynccontextmanager

    for name in [name for name in os.environ if name.startswith("ULLM_SCRIPTED_")]:
        monkeypatch.delenv(name)  # exported for other models

    @asynccontextmanager
    async def open_it(**options: Any) -> Any:
        from ullm.testing.engine import open_scripted_engine

        _require_trio("ullm_engine")
        options["faults"] = ullm_faults.plan_with(options.get("faults", ""))
        with ExitStack() as until_it_has_stopped:
            async with open_scripted_engine(ullm_scripted_model, **options) as engine:
                until_it_has_stopped.enter_context(ullm_faults.also_in(engine.faults))
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

    from ullm.testing.server import SCRIPTED, STEP_SECONDS, ServerProcess

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


@pytest.fixture(scope="module")
def ullm_module_server(
    ullm_scripted_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedServers]:
    """Share servers between the tests of a module: ``server = ullm_module_server("--max-bs", "8")``.

    The same options get the same server, with nothing armed, awake, and with nothing in flight.
    """
    from ullm.testing.shared import SharedServers

    with SharedServers(ullm_scripted_model, tmp_path_factory) as servers:
        yield servers


@pytest.fixture(scope="session")
def ullm_session_server(
    ullm_scripted_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedServers]:
    """Share servers between all tests; used like ``ullm_module_server``. Each worker of xdist has its own."""
    from ullm.testing.shared import SharedServers

    with SharedServers(ullm_scripted_model, tmp_path_factory) as servers:
        yield servers


def _require_trio(name: str) -> None:
    """Fail with a line that says what to do, where a test runs on another event loop."""
    import sniffio

    try:
        library = sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        library = "none"
    if library != "trio":
        pytest.fail(
            f"{name} needs trio, and this test runs on {library}: have pytest-trio run it, or take "
            "ullm_server, which any client can reach, or ullm.LLM, which works in asyncio",
            pytrace=False,
        )


# --- hooks ------------------------------------------------------------------------------------------------

SHARED = ("ullm_module_server", "ullm_session_server")


def _shared(item: pytest.Item) -> list[SharedServers]:
    arguments: dict[str, Any] = getattr(item, "funcargs", {})
    return [arguments[name] for name in SHARED if name in arguments]


def _control(item: pytest.Item) -> FaultControl | None:
    """Return what has the test's faults: its fixture, or one that is made for its shared servers."""
    found: FaultControl | None = getattr(item, "funcargs", {}).get("ullm_faults")
    return found or item.stash.get(_OWN, None)


_OWN: pytest.StashKey[FaultControl] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Have the shared servers of a test join its faults."""
    yield
    for servers in _shared(item):
        control = _control(item)
        if control is None:
            from ullm.testing.control import FaultControl

            control = item.stash[_OWN] = FaultControl()
        servers.begin_test(control)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test whose faults have not all fired: it has not tested what it is about."""
    yield
    faults = _control(item)
    if faults is not None and faults.strict:
        faults.assert_all_fired()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Have the report of a test that fails say what was injected."""
    report = yield
    faults = _control(item)
    if faults is not None and report.when == "call" and report.failed and (text := faults.report()):
        report.sections.append(("Injected faults", f"{text}\ntest   pytest '{item.nodeid}'"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Have the shared servers leave: the next test has faults of its own."""
    for servers in _shared(item):
        servers.end_test()
    yield
