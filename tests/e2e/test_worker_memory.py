"""Resident memory of a worker with the real model, seen from outside, awake and asleep."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from ullm.actors.transports import Transport, WorkerSpec
from ullm.actors.transports.process import open_process
from ullm.config import EngineConfig
from ullm.errors import WorkerLost
from ullm.protocol.messages import (
    Asleep,
    Awake,
    Failed,
    FromWorker,
    ModelInfo,
    NewSequence,
    RankSpec,
    Ready,
    Sampled,
    ScheduledSequence,
    Sleep,
    Start,
    Step,
    StepResult,
    ToWorker,
    Wake,
)
from ullm.sampling import SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="what is resident is counted as on Linux"),
]
PARAMS = SamplingParams(temperature=0, logprobs=1, ignore_eos=True)
SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 3, 256, 4
PROMISED = 0.8
"""Part of the weights and of the KV cache that must be given back."""
SLACK = 8 << 20
"""Bytes that come and go by themselves: stacks, pages of libraries that are used for the first time."""


class MeasuredWorker:
    """A worker process, asked and answered."""

    def __init__(self, transport: Transport) -> None:
        assert transport.pid is not None
        self._transport, self._process = transport, psutil.Process(transport.pid)
        self._steps: Iterator[int] = count()

    @property
    def resident(self) -> int:
        """Bytes, as the system counts them."""
        return int(self._process.memory_info().rss)

    async def ask(self, message: ToWorker, kind: type[FromWorker]) -> Any:
        """The answer, after any signs of life."""
        await self._transport.send(message)
        with trio.fail_after(240):
            while not isinstance(answer := await self._transport.receive(), kind):
                if isinstance(answer, Failed):
                    raise WorkerLost("worker", answer.traceback)
        return answer

    async def step(
        self, rows: Sequence[ScheduledSequence], new: Sequence[NewSequence] = (), forget: Sequence[int] = ()
    ) -> list[Sampled]:
        """What one step samples."""
        step = Step(next(self._steps), list(rows), list(new), list(forget))
        result: StepResult = await self.ask(step, StepResult)
        return result.sampled

    async def speak(self, info: ModelInfo) -> list[Sampled]:
        """Fill some of the KV cache; the tokens and their exact probabilities."""
        said: list[Sampled] = []
        blocks = -(-(PROMPT_TOKENS + NEW_TOKENS) // info.block_size)
        for i in range(SEQUENCES):
            tokens = [100 + (7 * j * (i + 3)) % 40000 for j in range(PROMPT_TOKENS)]
            table = list(range(i * blocks, (i + 1) * blocks))
            new = NewSequence(i, tokens, PROMPT_TOKENS, PARAMS, table)
            said += await self.step([ScheduledSequence(i, 0, PROMPT_TOKENS, True)], [new])
        for k in range(NEW_TOKENS):
            said += await self.step(
                [ScheduledSequence(i, PROMPT_TOKENS + k, 1, True) for i in range(SEQUENCES)]
            )
        await self.step([], forget=list(range(SEQUENCES)))
        return said


@pytest.mark.parametrize("cpu_kernels", [False, True])
async def test_resident_memory_falls_and_comes_back(real_model: Path, cpu_kernels: bool) -> None:
    dtype: Any = "bfloat16" if cpu_kernels else "float32"  # PyTorch is slow with bfloat16 on many CPUs
    config = EngineConfig(device="cpu", dtype=dtype, cpu_kernels=cpu_kernels)
    async with open_process(WorkerSpec(RankSpec(), config.runner)) as transport:
        worker = MeasuredWorker(transport)
        info = (await worker.ask(Start(config, RankSpec(), str(real_model)), Ready)).info
        expected = await worker.speak(info)
        pool = SEQUENCES * (PROMPT_TOKENS + NEW_TOKENS) * info.kv_bytes_per_token
        awake = worker.resident
        for levels, promised in [
            ([1], pool),
            ([1, 2], pool + info.weight_bytes),
            ([2], pool + info.weight_bytes),
        ]:
            for level in levels:
                asleep = await worker.ask(Sleep(level), Asleep)
            fell = awake - worker.resident
            assert fell >= PROMISED * promised
            assert PROMISED * promised <= sum(asleep.given_back.values()) <= fell + SLACK
            info = (await worker.ask(Wake(), Awake)).info
            assert await worker.speak(info) == expected
            assert abs(worker.resident - awake) <= (1 - PROMISED) * (pool + info.weight_bytes)
            awake = worker.resident
        await transport.stop(10)
