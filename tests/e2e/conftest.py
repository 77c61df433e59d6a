"""Real servers, real signals, real clients; each bounded in time, none leaves anything behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import SCRIPTED, Serve, Server, starting_servers
from ullm.config import ModelConfig
from ullm.hub import resolve
from ullm.testing import write_scripted_model, write_tiny_model


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers; after the test, look for what they have left behind."""
    with starting_servers() as start:
        yield start


@pytest.fixture(scope="session")
def scripted_server(scripted_model: Path) -> Iterator[Server]:
    """A server for tests that do not disturb each other."""
    with starting_servers() as start:
        yield start("--model", str(scripted_model), *SCRIPTED)


@pytest.fixture(scope="module", params=["process", pytest.param("thread", marks=pytest.mark.slow)])
def tough_server(request: pytest.FixtureRequest, scripted_model: Path) -> Iterator[Server]:
    """A server per transport, for tests that break it and leave it as it was: it never gives up."""
    options = ("--transport", request.param, "--step-timeout", "1", "--max-restarts", "1000000")
    with starting_servers() as start:
        yield start("--model", str(scripted_model), *SCRIPTED, *options)


@pytest.fixture(params=["process", pytest.param("thread", marks=pytest.mark.slow)])
def transport(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Options for each kind of worker that every machine has."""
    return "--transport", request.param


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The embedded default model, fetched and converted if it is not in the cache yet."""
    return resolve(ModelConfig()).path


@pytest.fixture(scope="session")
def real_server(real_model: Path) -> Iterator[Server]:
    """A server of the real model for tests that do not disturb each other.

    PyTorch computes for it: on a CPU without AVX-512 that is several times as fast as the C++ kernels.
    """
    with starting_servers() as start:
        yield start("--dtype", "float32", "--no-cpu-kernels", "--standby-workers", "0")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand weights."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def scripted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scripted model that takes 5 ms a step."""
    return write_scripted_model(tmp_path_factory.mktemp("models") / "scripted", step_seconds=0.005)
