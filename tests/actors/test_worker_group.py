"""The ranks of a worker group: where they meet, how they agree, and which one is said to be lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec import structs

from ullm.actors.worker_group import RENDEZVOUS_ROUNDS, WorkerGroup, rendezvous_port
from ullm.config import EngineConfig, Tuning
from ullm.errors import WorkerLost
from ullm.protocol.messages import ModelInfo, Progress, Start, Step, StepResult, ToWorker
from ullm.testing import FakeWorkers, ScriptedRunner


def test_rendezvous_ports_are_in_a_bounded_range_and_not_shared() -> None:
    config = EngineConfig(replicas=3, nccl_port=30_000)
    ports = {
        (slot, epoch): rendezvous_port(config, slot, epoch)
        for slot in range(config.replicas)
        for epoch in range(1, 1 + RENDEZVOUS_ROUNDS)
    }
    assert set(ports.values()) == set(range(30_000, 30_000 + 3 * RENDEZVOUS_ROUNDS))
    assert len(set(ports.values())) == len(ports)
    assert rendezvous_port(config, 1, 1 + RENDEZVOUS_ROUNDS) == ports[1, 1]


# --- several ranks, in memory -----------------------------------------------------------------------------

ADDRESS = "127.0.0.1:4711"


class RankRunner(ScriptedRunner):
    """A scripted runner that knows its rank, and announces where it listens."""

    def load(self, start: Start, progress: Callable[[Progress], None]) -> ModelInfo:
        self.rank = start.rank.rank
        if self.rank == 0:
            progress(Progress("rendezvous", 1.0, ADDRESS))
        return super().load(start, progress)


class DisagreeingRunner(RankRunner):
    """Rank 1 has other tokens from the third step on."""

    def submit(self, step: Step) -> Any:
        result = super().submit(step).result()
        return Done(structs.replace(result, digest=int(self.rank == 1 and step.step_id >= 3)))


class FailingRunner(RankRunner):
    """Rank 1 fails, as it does when its peer is gone."""

    def submit(self, step: Step) -> Any:
        if self.rank == 1:
            raise RuntimeError("Connection closed by peer")
        return super().submit(step)


class Done:
    """A step that is done."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self._result


class Group:
    """A worker group of two ranks that runs until it is lost, or the block ends."""

    def __init__(self, model: Path, runner: str) -> None:
        path = f"{__name__}:{runner}"
        config = EngineConfig(model=str(model), tp_size=2, runner=path, transport="fake", load_format="dummy")
        self.workers = FakeWorkers()
        self.group = WorkerGroup(0, 0, config, self.workers.open)
        self.group.load_from(str(model), Tuning())
        self.lost: WorkerLost | None = None
        self.ended = trio.Event()
        self.results: list[StepResult] = []

    async def run(self, *, task_status: trio.TaskStatus[ModelInfo]) -> None:
        try:
            await self.group.run(task_status=task_status)
        except WorkerLost as error:
            self.lost = error
        self.ended.set()

    async def step(self, number: int) -> None:
        await self.group.send(Step(number, []))


@asynccontextmanager
async def grouped(model: Path, runner: str) -> AsyncIterator[Group]:
    async with trio.open_nursery() as nursery:
        started = Group(model, runner)
        await nursery.start(started.run)
        yield started
        nursery.cancel_scope.cancel()


async def test_the_address_that_rank_0_announces_is_given_to_the_others(clock: object, model: Path) -> None:
    async with grouped(model, "RankRunner") as started:
        starts = [worker.received[0] for worker in started.workers.started]
        assert [start.rank.rendezvous for start in starts if isinstance(start, Start)] == [
            "127.0.0.1:0",
            ADDRESS,
        ]


async def test_results_count_when_all_ranks_agree(clock: object, model: Path) -> None:
    async with grouped(model, "RankRunner") as started:
        barrier = await started.group.attach(started.results.append)
        for number in range(barrier + 1, barrier + 4):
            await started.step(number)
        await trio.sleep(1)
        assert [result.step_id for result in started.results] == [barrier + 1, barrier + 2, barrier + 3]


async def test_ranks_that_disagree_are_lost(clock: object, model: Path) -> None:
    async with grouped(model, "DisagreeingRunner") as started:
        assert await started.group.attach(started.results.append) == 1
        for number in (2, 3):
            await started.step(number)
        await started.ended.wait()
        assert str(started.lost) == (
            "replica0.rank1 has other tokens of step 3 than replica0.rank0 has chosen"
        )
        assert [result.step_id for result in started.results] == [2]


async def test_the_rank_that_was_lost_is_named_not_the_one_that_failed_because_of_it(
    clock: object, model: Path
) -> None:
    async with grouped(model, "FailingRunner") as started:
        await started.step(1)
        await trio.sleep(0.1)
        started.workers.started[0].die("was killed by SIGKILL")
        await started.ended.wait()
        assert str(started.lost) == "replica0.rank0 was killed by SIGKILL"


async def test_a_rank_that_fails_by_itself_is_named(clock: object, model: Path) -> None:
    async with grouped(model, "FailingRunner") as started:
        await started.step(1)
        await started.ended.wait()
        assert str(started.lost) == "replica0.rank1 failed: RuntimeError: Connection closed by peer"


async def test_a_step_reaches_a_rank_while_the_pipe_of_another_one_is_full(
    clock: object, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with grouped(model, "RankRunner") as started, trio.open_nursery() as nursery:
        first, second = started.workers.started

        async def full(message: ToWorker) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(first, "send", full)
        nursery.start_soon(started.step, 1)
        await trio.sleep(1)
        assert second.received[-1] == Step(1, [])
        nursery.cancel_scope.cancel()
