"""Real servers, real signals, real clients; each bounded in time, none leaves anything behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import SCRIPTED, Server, eventually

from ullm.config import ModelConfig
from ullm.hub import resolve
from ullm.testing import write_scripted_model, write_tiny_model

Serve = Callable[..., Server]


@contextmanager
def servers_looked_after() -> Iterator[Serve]:
    """Starts servers; afterwards ends them, and checks that nothing of them is left."""
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


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers; after the test looks for what they and the test have left behind."""
    children, shared = _children(), _shared_memory()
    with servers_looked_after() as start:
        yield start
    eventually(lambda: _children() <= children, seconds=2)
    segments = _shared_memory() - shared
    eventually(lambda: not _unheld(segments & _shared_memory()), seconds=5)


@pytest.fixture(scope="session")
def scripted_server(scripted_model: Path) -> Iterator[Server]:
    """A server for tests that do not disturb each other."""
    with servers_looked_after() as start:
        yield start("--model", str(scripted_model), *SCRIPTED)


@pytest.fixture(scope="module", params=["process", "thread"])
def tough_server(request: pytest.FixtureRequest, scripted_model: Path) -> Iterator[Server]:
    """Of each transport one, for tests that break it and leave it as it was: it never gives up."""
    options = ("--transport", request.param, "--step-timeout", "1", "--max-restarts", "1000000")
    with servers_looked_after() as start:
        yield start("--model", str(scripted_model), *SCRIPTED, *options)


@pytest.fixture(params=["process", "thread"])
def transport(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Options for each kind of worker that every machine has."""
    return "--transport", request.param


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
    return write_scripted_model(tmp_path_factory.mktemp("models") / "scripted", step_seconds=0.005)


def _children() -> set[int]:
    return {process.pid for process in psutil.Process().children()}


def _shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _unheld(names: set[str]) -> set[str]:
    """Segments that nobody has mapped: those of other users of the machine are not ours."""
    maps = [_maps(file) for file in Path("/proc").glob("[0-9]*/maps")] if names else []
    return {name for name in names if not any(f"/dev/shm/{name}" in text for text in maps)}


def _maps(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:  # gone meanwhile, or somebody else's
        return ""
