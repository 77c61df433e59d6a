"""A whole engine in one task tree: real but for its workers and its model."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ullm.actors.transports.fake import FakeBehaviour, FakeWorkers
from ullm.config import EngineConfig
from ullm.engine import Engine, open_engine
from ullm.testing.models import local_model

RUNNER = "ullm.testing:ScriptedRunner"


@asynccontextmanager
async def open_scripted_engine(
    model: Path | str, *, workers: FakeWorkers | None = None, **options: Any
) -> AsyncIterator[Engine]:
    """Open an engine over a scripted model, on workers in memory; stop it in order on leaving.

    Args:
        model: a folder from `write_scripted_model`.
        workers: to look at them, or to have them behave by themselves.
        options: fields of `FakeBehaviour`, such as ``step_seconds=1.0``, and of `EngineConfig`, such as
            ``faults="worker.step:crash@nth=3"``.
    """
    names = {field.name for field in dataclasses.fields(FakeBehaviour)}
    behaviour = {name: options.pop(name) for name in names & set(options)}
    workers = workers or FakeWorkers(FakeBehaviour(**behaviour))
    config = EngineConfig(model=str(model), runner=RUNNER, **options)
    async with open_engine(
        config, transport=workers.open, find_model=lambda config: local_model(model)
    ) as engine:
        yield engine
