"""Real servers, real signals, real clients; each bounded in time, none leaves anything behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Server, eventually, is_gone

from ullm.config import ModelConfig
from ullm.hub import resolve
from ullm.testing import write_scripted_model, write_tiny_model


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers; afterwards checks that nothing of them is left."""
    servers: list[Server] = []
    seen: list[psutil.Process] = []

    def start(*arguments: str, **options: Any) -> Server:
        server = Server(*arguments, log=tmp_path / f"server{len(servers)}.log", **options)
        servers.append(server)
        if server.process.poll() is None:
            seen.extend([psutil.Process(server.process.pid), *server.children()])
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.signal(signal.SIGTERM)
            server.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
    eventually(lambda: all(map(is_gone, seen)), seconds=2)


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
    return write_scripted_model(tmp_path_factory.mktemp("scripted"), step_seconds=0.005)
