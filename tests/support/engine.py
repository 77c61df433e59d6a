"""Engines on a virtual clock, with workers in memory; tests/conftest.py makes fixtures of this."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trio.testing import MockClock

    from ullm.engine import Engine
    from ullm.engine.output import Output
    from ullm.sampling import SamplingParams
    from ullm.testing import FakeWorkers, ScriptedSettings

Open = Callable[..., "AbstractAsyncContextManager[tuple[Engine, FakeWorkers]]"]
"""What the fixture `opened` is."""

PROMPT = [300, 301, 302]
STEP = 1.0
"""Virtual seconds that a step takes, unless a test has it otherwise."""


@pytest.fixture
def clock() -> MockClock:
    """A virtual clock, on which pytest-trio runs the test that asks for it."""
    from ullm.testing import virtual_clock

    return virtual_clock()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scripted model's folder. Modules that need another one have a fixture of the same name."""
    from ullm.testing import write_scripted_model

    return write_scripted_model(tmp_path_factory.mktemp("scripted"))


@pytest.fixture
def script(model: Path) -> ScriptedSettings:
    """What the model generates."""
    from ullm.testing import ScriptedSettings

    return ScriptedSettings.read(str(model))


@pytest.fixture
def opened(model: Path) -> Open:
    """Open engines on fake workers: ``async with opened(behaviour, option=…) as (engine, workers)``."""
    from ullm.config import EngineConfig
    from ullm.engine import open_engine
    from ullm.testing import FakeBehaviour, FakeWorkers, local_model

    @asynccontextmanager
    async def open_it(
        behaviour: Any = None, find_model: Any = None, **options: Any
    ) -> AsyncIterator[tuple[Engine, FakeWorkers]]:
        workers = FakeWorkers(behaviour=behaviour or FakeBehaviour(step_seconds=STEP))
        options = {"model": str(model), **options}
        config = EngineConfig(runner="ullm.testing:ScriptedRunner", **options)
        find_model = find_model or (lambda config: local_model(model))
        async with open_engine(config, transport=workers.open, find_model=find_model) as engine:
            yield engine, workers

    return open_it


async def collect(
    engine: Engine, prompt: list[int] | str | None = None, params: SamplingParams | None = None
) -> list[Output]:
    """Generate, and return all outputs; ten tokens without randomness, unless a test has it otherwise."""
    from ullm.sampling import SamplingParams

    prompt = PROMPT if prompt is None else prompt
    params = params or SamplingParams(temperature=0, max_tokens=10)
    async with engine.generate(prompt, params) as generation:
        return [output async for output in generation]


def tokens_of(outputs: list[Output], index: int = 0) -> list[int]:
    """Return the tokens of one choice."""
    return [token for output in outputs if output.index == index for token in output.token_ids]
