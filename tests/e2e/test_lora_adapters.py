"""Adapters in a real engine whose worker is killed: texts are those of the adapter, before and after."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import transformers
import trio
import trio.lowlevel

from tests.model.lora_fixtures import ALL, matrices, merged, write_adapter
from ullm.config import EngineConfig
from ullm.engine import Engine, open_engine
from ullm.sampling import SamplingParams
from ullm.testing import write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.process]
PROMPT = [40, 50, 60, 70, 80]


async def tokens(engine: Engine, lora: str | None, count: int = 24) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, lora=lora)
    async with engine.generate(PROMPT, params) as generation:
        return [token async for output in generation for token in output.token_ids]


def greedy(model: transformers.PreTrainedModel, count: int = 24) -> list[int]:
    found = list(PROMPT)
    with torch.no_grad():
        for _ in range(count):
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))  # type: ignore[operator]
    return found[len(PROMPT) :]


async def test_adapters_over_the_loss_of_a_worker_a_sleep_and_a_reload(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model", "qwen3")
    base = transformers.AutoModelForCausalLM.from_pretrained(path).float().eval()
    made = {name: matrices(base, ALL, 4, seed) for seed, name in enumerate(("one", "two"))}
    folders = {name: write_adapter(tmp_path / name, each) for name, each in made.items()}
    expected = {name: greedy(merged(base, each)) for name, each in made.items()}
    expected_base = greedy(base)
    config = EngineConfig(
        model=str(path), dtype="float32", device="cpu", context_len=256, lora=(f"one={folders['one']}",)
    )
    async with open_engine(config) as engine:
        await engine.load_adapter("two", str(folders["two"]))
        found: dict[str | None, list[int]] = {}

        async def ask(lora: str | None) -> None:
            found[lora] = await tokens(engine, lora)

        async def check() -> None:
            found.clear()
            async with trio.open_nursery() as nursery:
                for lora in (None, "one", "two"):
                    nursery.start_soon(ask, lora)
            assert found == {None: expected_base, **expected}

        await check()
        (pid,) = engine.health().replicas[0].worker_pids
        async with trio.open_nursery() as nursery:
            nursery.start_soon(check)
            await trio.lowlevel.checkpoint()
            os.kill(pid, signal.SIGKILL)
        await engine.sleep(2)
        await check()
        await engine.reload()
        await check()
