"""Loading and unloading adapters on a virtual clock, with workers in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import PROMPT, Open, collect
from ullm.errors import (
    AdapterUnusable,
    ConfigError,
    EngineBusy,
    InvalidParameter,
    ModelUnknown,
    ReloadFailed,
)
from ullm.protocol.messages import Adapter, KeepAdapter, Step
from ullm.sampling import SamplingParams
from ullm.testing import FakeBehaviour, FakeWorker, FakeWorkers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an adapter's folder has; the scripted runner reads none of it."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    return tmp_path


def asked(workers: FakeWorkers) -> list[list[tuple[str, bool]]]:
    """What each worker was told to keep or to drop."""
    return [
        [(each.adapter.name, each.wanted) for each in worker.received if isinstance(each, KeepAdapter)]
        for worker in workers.started
    ]


def used(worker: FakeWorker) -> list[Adapter | None]:
    """The adapters of the sequences that a worker got."""
    steps = [message for message in worker.received if isinstance(message, Step)]
    return [new.adapter for step in steps for new in step.new_sequences]


def params(lora: str | None, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=10, lora=lora, **others)


async def test_an_adapter_is_loaded_used_and_unloaded(clock: MockClock, opened: Open, folder: Path) -> None:
    async with opened(replicas=2) as (engine, workers):
        with pytest.raises(ModelUnknown, match="'sql' is not served here; this server serves no adapters"):
            await collect(engine, params=params("sql"))
        await engine.load_adapter("sql", str(folder))
        await collect(engine, params=params("sql"))
        await collect(engine)
        await engine.unload_adapter("sql")
        with pytest.raises(ModelUnknown):
            await collect(engine, params=params("sql"))
        with pytest.raises(ModelUnknown):
            await engine.unload_adapter("sql")
    assert asked(workers) == [[("sql", True), ("sql", False)]] * 2
    names = [adapter.name if adapter else None for worker in workers.started for adapter in used(worker)]
    assert sorted(names, key=str) == [None, "sql"]


async def test_adapters_of_the_configuration(clock: MockClock, opened: Open, folder: Path) -> None:
    async with opened(lora=(f"sql={folder}",)) as (engine, workers):
        assert [adapter.path for adapter in engine.adapters] == [str(folder)]
        await collect(engine, params=params("sql"))
    assert asked(workers) == [[("sql", True)]]


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [("broken", "", "is broken"), ("sql", "/nowhere", "is no folder"), ("sql", "/", "has no adapter_config")],
)
async def test_an_adapter_that_cannot_be_used_ends_the_start(
    clock: MockClock, opened: Open, folder: Path, name: str, path: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=f"--lora: adapter '{name}': .*{words}"):
        async with opened(lora=(f"{name}={path or folder}",)):
            raise AssertionError("it started")


@pytest.mark.parametrize("lora", ["sql", "=x", "sql=", "fake=x", "a=x,a=y"])
async def test_entries_that_make_no_sense_are_refused(clock: MockClock, opened: Open, lora: str) -> None:
    with pytest.raises(ConfigError, match="--lora"):
        async with opened(lora=tuple(lora.split(",")), served_model_name="fake"):
            raise AssertionError("it started")


async def test_a_broken_adapter_changes_nothing(clock: MockClock, opened: Open, folder: Path) -> None:
    async with opened(replicas=2) as (engine, workers):
        with pytest.raises(AdapterUnusable, match=r"adapter 'broken': .*is broken"):
            await engine.load_adapter("broken", str(folder))
        assert not list(engine.adapters)
        assert len(await collect(engine)) > 0
    assert asked(workers) == [[("broken", True), ("broken", False)], [("broken", False)]]


async def test_names_that_are_taken(clock: MockClock, opened: Open, folder: Path) -> None:
    async with opened(served_model_name="base") as (engine, workers):
        await engine.load_adapter("sql", str(folder))
        for name in ("sql", "base", "a=b", ""):
            with pytest.raises(InvalidParameter, match="lora_name"):
                await engine.load_adapter(name, str(folder))
        await engine.load_adapter("sql", str(folder), replace=True)
        assert [adapter.number for adapter in engine.adapters] == [2]
    assert asked(workers) == [[("sql", True), ("sql", True), ("sql", False)]]


async def test_a_request_keeps_its_adapter_over_an_unload_and_a_loss(
    clock: MockClock, opened: Open, folder: Path
) -> None:
    async with opened() as (engine, workers), trio.open_nursery() as nursery:
        await engine.load_adapter("sql", str(folder))
        outputs: list[Any] = []

        async def ask() -> None:
            async with engine.generate(PROMPT, params("sql")) as generation:
                outputs.extend([output async for output in generation])

        nursery.start_soon(ask)
        await trio.sleep(3.5)
        await engine.unload_adapter("sql")
        workers.started[0].die("was killed by SIGKILL")
        nursery.start_soon(collect, engine)
    assert outputs[-1].finish_reason == "length"
    assert [adapter and adapter.name for adapter in used(workers.started[1])] == ["sql", None]


@pytest.mark.parametrize("losses", [1, 2])
async def test_workers_lost_with_an_adapter(
    clock: MockClock, opened: Open, folder: Path, losses: int
) -> None:
    left = [losses]

    def dies(message: Any) -> bool:
        left[0] -= isinstance(message, KeepAdapter)
        return isinstance(message, KeepAdapter) and left[0] >= 0

    async with opened(FakeBehaviour(die_on=dies)) as (engine, workers):
        if losses == 1:
            await engine.load_adapter("sql", str(folder))
            assert "sql" in engine.adapters
        else:
            with pytest.raises(AdapterUnusable, match="was lost"):
                await engine.load_adapter("sql", str(folder))
            assert "sql" not in engine.adapters
        assert len(await collect(engine)) > 0
    assert len(workers.started) == 1 + losses


@pytest.mark.parametrize("level", [0, 1, 2, 3])
async def test_adapters_and_sleep(clock: MockClock, opened: Open, folder: Path, level: int) -> None:
    async with opened() as (engine, _):
        await engine.load_adapter("one", str(folder))
        await engine.sleep(level)
        await collect(engine, params=params("one"))
        await engine.sleep(level)
        await engine.unload_adapter("one")
        assert engine.health().state == "sleeping"
        await engine.load_adapter("two", str(folder))
        assert engine.health().state == "running"
        await collect(engine, params=params("two"))


async def test_a_reload_takes_the_adapters_along(clock: MockClock, opened: Open, folder: Path) -> None:
    async with opened() as (engine, workers):
        await engine.load_adapter("sql", str(folder))
        await engine.reload()
        await collect(engine, params=params("sql"))
    assert asked(workers) == [[("sql", True)], [("sql", True)]]
    assert [adapter and adapter.name for adapter in used(workers.started[1])] == ["sql"]


async def test_a_model_that_an_adapter_does_not_fit_is_not_taken(
    clock: MockClock, opened: Open, folder: Path
) -> None:
    def dies(message: Any) -> bool:
        return isinstance(message, KeepAdapter) and len(workers.started) > 1

    async with opened(FakeBehaviour(die_on=dies), max_restarts=5) as (engine, workers):
        await engine.load_adapter("sql", str(folder))
        with pytest.raises(ReloadFailed, match="adapter 'sql'"):
            await engine.reload()
        await collect(engine, params=params("sql"))
        assert len(used(workers.started[0])) == 1


async def test_a_stop_overtakes_an_adapter(clock: MockClock, opened: Open, folder: Path) -> None:
    slow = FakeBehaviour(hang_on=lambda message: isinstance(message, KeepAdapter))
    async with opened(slow) as (engine, _), trio.open_nursery() as nursery:

        async def load() -> None:
            with pytest.raises(EngineBusy):
                await engine.load_adapter("sql", str(folder))

        nursery.start_soon(load)
        await trio.sleep(1.0)
        await engine.shutdown(0.0)
