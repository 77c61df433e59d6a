"""Adapters of an engine, as its front ends see and use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import collect, tokens_of
from tests.support.linked import linked
from ullm.errors import AdapterUnusable, InvalidParameter, ModelUnknown
from ullm.sampling import SamplingParams

SQL = SamplingParams(temperature=0, max_tokens=6, lora="sql")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    return tmp_path


async def test_they_are_loaded_used_and_unloaded(clock: MockClock, model: Path, folder: Path) -> None:
    async with linked(model) as (engine, world):
        with pytest.raises(ModelUnknown, match="'sql'"):
            await collect(engine, params=SQL)
        await engine.load_adapter("sql", str(folder))
        assert [adapter.path for adapter in engine.adapters] == [str(folder)]
        assert len(tokens_of(await collect(engine, params=SQL))) == 6
        with pytest.raises(InvalidParameter, match="loaded already"):
            await engine.load_adapter("sql", str(folder))
        with pytest.raises(AdapterUnusable, match="is no folder"):
            await engine.load_adapter("other", "/nowhere")
        await world.engines[0].load_adapter("beside", str(folder))
        await trio.sleep(2)
        assert {adapter.name for adapter in engine.adapters} == {"sql", "beside"}
        await engine.unload_adapter("sql")
        with pytest.raises(ModelUnknown, match="serves 'beside'"):
            await collect(engine, params=SQL)


@pytest.mark.parametrize("there", ["same", "changed", "gone"])
async def test_a_request_goes_on_in_another_engine_that_has_the_same_adapter(
    clock: MockClock, model: Path, folder: Path, there: str
) -> None:
    async with linked(model) as (engine, world), trio.open_nursery() as nursery:
        await engine.load_adapter("sql", str(folder))

        async def lose() -> None:
            await trio.sleep(2.5)
            world.kill()
            if there == "changed":
                (folder / "adapter_model.safetensors").write_bytes(b"other")
            await world.start_engine(lora=() if there == "gone" else (f"sql={folder}",))

        nursery.start_soon(lose)
        if there == "same":
            assert len(tokens_of(await collect(engine, params=SQL))) == 6
        else:
            with pytest.raises(AdapterUnusable if there == "changed" else ModelUnknown):
                await collect(engine, params=SQL)
    assert len(world.engines) == 2
