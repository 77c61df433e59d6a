"""The pool of standby workers, on fake ones and a virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from ullm.actors import standby_pool
from ullm.actors.standby_pool import StandbyPool, StandbyStatistics
from ullm.actors.transports import Transport, WorkerSpec
from ullm.actors.transports.fake import FakeBehaviour, FakeWorker, FakeWorkers
from ullm.config import GIB, EngineConfig
from ullm.errors import WorkerLost
from ullm.protocol.messages import Ping, Pong, Prepare, Prepared, RankSpec, Ready, Start, Stop, Stopped

SCRIPTED = "ullm.testing:ScriptedRunner"
MODEL = "scripted:"
CONFIG = EngineConfig(num_blocks=16)


def spec(replica: int = 0, rank: int = 0, epoch: int = 1) -> WorkerSpec:
    return WorkerSpec(RankSpec(replica=replica, rank=rank, epoch=epoch), SCRIPTED)


class Pool:
    """A running pool over fake workers."""

    def __init__(self, workers: FakeWorkers, memory: Callable[[], int]) -> None:
        self.workers = workers
        self.pool = StandbyPool(workers.open, memory)

    @property
    def standbys(self) -> list[FakeWorker]:
        """All workers that were ever started as standbys."""
        return [worker for worker in self.workers.started if worker.spec.standby]

    @property
    def statistics(self) -> StandbyStatistics:
        return self.pool.statistics()

    def prepare(self, config: EngineConfig = CONFIG, model: str = MODEL) -> None:
        self.pool.prepare(config, model, need=GIB)


@asynccontextmanager
async def running(
    behaviour: FakeBehaviour | None = None, memory: Callable[[], int] = lambda: 100 * GIB
) -> AsyncIterator[Pool]:
    result = Pool(FakeWorkers(behaviour or FakeBehaviour()), memory)
    async with trio.open_nursery() as nursery:
        await nursery.start(result.pool.run)
        yield result
        nursery.cancel_scope.cancel()
    assert not any(worker.alive() for worker in result.workers.started)


async def start(transport: Transport, config: EngineConfig = CONFIG) -> None:
    await transport.send(Start(config, RankSpec(), MODEL))
    while not isinstance(await transport.receive(), Ready):
        pass


async def test_a_standby_is_prepared_when_the_workers_are_ready(autojump_clock: MockClock) -> None:
    async with running() as pool, pool.pool.open(spec(epoch=1)) as worker:
        await start(worker)
        await trio.sleep(100)
        assert pool.standbys == []  # `prepare` has not been called
        pool.prepare()
        await trio.sleep(standby_pool.SETTLE_SECONDS + 0.1)
        (standby,) = pool.standbys
        assert standby.received == [Prepare(CONFIG, spec().rank, MODEL)]
        assert pool.statistics == StandbyStatistics(1, 0, 0, 0, ())


async def test_a_standby_is_taken_and_replaced(autojump_clock: MockClock) -> None:
    async with running() as pool:
        async with pool.pool.open(spec()):
            pool.prepare()
            await trio.sleep(10)
        async with pool.pool.open(spec(replica=3, epoch=2)) as worker:
            (standby,) = pool.standbys
            assert worker is standby
            assert worker.name == "replica3.rank0"
            await start(worker)
            await worker.send(Ping(1))
            assert await worker.receive() == Pong(1)
            await trio.sleep(standby_pool.SETTLE_SECONDS / 2)
            assert pool.standbys == [standby]  # the one that serves comes first
            await trio.sleep(standby_pool.SETTLE_SECONDS)
            assert pool.statistics == StandbyStatistics(1, 0, 1, 0, ())
            standby.die("was killed by SIGKILL")
            with pytest.raises(WorkerLost, match=r"replica3\.rank0 was killed by SIGKILL"):
                await worker.receive()
        assert pool.statistics.lost_total == 0  # it was no standby any more


async def test_leaving_a_taken_worker_ends_it(autojump_clock: MockClock) -> None:
    async with running() as pool:
        async with pool.pool.open(spec()):
            pool.prepare()
            await trio.sleep(10)
        async with pool.pool.open(spec()) as worker:
            assert worker.alive()
        assert not worker.alive()


async def test_a_cancelled_user_of_a_taken_worker(autojump_clock: MockClock) -> None:
    async with running() as pool:
        async with pool.pool.open(spec()):
            pool.prepare()
            await trio.sleep(10)
        with trio.move_on_after(1):
            async with pool.pool.open(spec()) as worker:
                await trio.sleep_forever()
        assert not worker.alive()


@pytest.mark.parametrize(
    "other",
    [
        WorkerSpec(RankSpec(rank=1), SCRIPTED),
        WorkerSpec(RankSpec(world_size=2), SCRIPTED),
        WorkerSpec(RankSpec(device_index=1), SCRIPTED),
        WorkerSpec(RankSpec(), SCRIPTED, cpu_threads=1),
        WorkerSpec(RankSpec(), "other:Runner"),
    ],
)
async def test_a_standby_of_another_kind_is_not_taken(autojump_clock: MockClock, other: WorkerSpec) -> None:
    async with running() as pool:
        async with pool.pool.open(spec()):
            pool.prepare()
            await trio.sleep(10)
        assert len(pool.standbys) == 1
        async with pool.pool.open(other) as worker:
            assert worker not in pool.standbys
        assert pool.statistics.prepared == 1


async def test_one_for_each_worker_or_as_many_as_configured(autojump_clock: MockClock) -> None:
    async with running() as pool, pool.pool.open(spec(replica=0)), pool.pool.open(spec(replica=1)):
        pool.prepare()
        await trio.sleep(10)
        assert pool.statistics.prepared == 2
        pool.prepare(EngineConfig(num_blocks=16, standby_workers=2))
        await trio.sleep(10)
        assert pool.statistics.prepared == 4
        pool.prepare(EngineConfig(num_blocks=16, standby_workers=0))
        await trio.sleep(10)
        assert pool.statistics.prepared == 0


async def test_a_kind_that_is_no_longer_used_has_no_surplus_standbys(autojump_clock: MockClock) -> None:
    """As after a reload, when the old workers have ended beside the new ones."""
    async with running() as pool:
        async with pool.pool.open(spec(replica=0)):
            pool.prepare()
            async with pool.pool.open(spec(replica=1)):
                await trio.sleep(10)
                assert pool.statistics.prepared == 2
            pool.prepare()
            await trio.sleep(10)
            assert pool.statistics.prepared == 1


async def test_a_reload_prepares_anew(autojump_clock: MockClock) -> None:
    async with running() as pool, pool.pool.open(spec()):
        pool.prepare()
        await trio.sleep(10)
        pool.prepare(model="scripted:other")
        await trio.sleep(10)
        first, second = pool.standbys
        assert not first.alive()
        assert second.received == [Prepare(CONFIG, RankSpec(epoch=1), "scripted:other")]
        assert pool.statistics == StandbyStatistics(1, 0, 0, 0, ())


async def test_a_dead_standby_is_replaced_later_each_time(autojump_clock: MockClock) -> None:
    async with running() as pool, pool.pool.open(spec()):
        pool.prepare()
        await trio.sleep(10)
        times = []
        for number in range(1, 9):
            while len(pool.standbys) < number or not pool.statistics.prepared:  # noqa: ASYNC110  # virtual time
                await trio.sleep(0.1)
            times.append(trio.current_time())
            pool.standbys[-1].die("was killed by SIGKILL")
        pauses = [round(after - before) for before, after in pairwise(times)]
        assert pauses == [1, 2, 4, 8, 16, 32, 60]
        await trio.testing.wait_all_tasks_blocked()
        assert pool.statistics.lost_total == 8


async def test_a_loss_long_after_the_last_is_the_first_again(autojump_clock: MockClock) -> None:
    async with running() as pool, pool.pool.open(spec()):
        pool.prepare()
        for number in range(1, 5):
            await trio.sleep(2 * standby_pool.STEADY_SECONDS)
            assert len(pool.standbys) == number
            pool.standbys[-1].die("was killed by SIGKILL")
        await trio.sleep(1.5 * standby_pool.BACKOFF_SECONDS)
        assert pool.statistics.prepared == 1


async def test_standbys_that_never_come_up_disturb_nobody(autojump_clock: MockClock) -> None:
    behaviour = FakeBehaviour(die_on=lambda message: isinstance(message, Prepare))
    async with running(behaviour) as pool, pool.pool.open(spec()) as worker:
        await start(worker)
        pool.prepare()
        await trio.sleep(3600)
        assert 60 < pool.statistics.lost_total < 80
        assert worker.alive()


async def test_a_transport_that_fails_disturbs_nobody(autojump_clock: MockClock) -> None:
    workers = FakeWorkers()

    @asynccontextmanager
    async def open_transport(wanted: WorkerSpec) -> AsyncIterator[Transport]:
        if wanted.standby:
            raise OSError("too many open files")
        async with workers.open(wanted) as transport:
            yield transport

    pool = StandbyPool(open_transport, lambda: 100 * GIB)
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        async with pool.open(spec()) as worker:
            pool.prepare(CONFIG, MODEL, 0)
            await trio.sleep(10)
            assert worker.alive()
            assert pool.statistics().lost_total > 1
        nursery.cancel_scope.cancel()


async def test_a_standby_that_hangs_is_given_up_and_not_taken(autojump_clock: MockClock) -> None:
    behaviour = FakeBehaviour(hang_on=lambda message: isinstance(message, Prepare))
    async with running(behaviour) as pool, pool.pool.open(spec()):
        pool.prepare()
        await trio.sleep(10)
        assert pool.statistics == StandbyStatistics(0, 1, 0, 0, ())
        async with pool.pool.open(spec(epoch=2)) as worker:
            assert worker not in pool.standbys
        await trio.sleep(standby_pool.PREPARE_SECONDS)
        assert pool.statistics.lost_total == 1


async def test_a_suspended_standby_is_not_taken(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as pool, pool.pool.open(spec()):
        pool.prepare()
        await trio.sleep(10)
        (standby,) = pool.standbys
        monkeypatch.setattr(standby, "suspended", lambda: True)
        async with pool.pool.open(spec(epoch=2)) as worker:
            assert worker is not standby
            await trio.sleep(1)
        assert not standby.alive()


async def test_memory_decides_where_nobody_asked_for_standbys(autojump_clock: MockClock) -> None:
    available = [standby_pool.MEMORY_RESERVE + GIB - 1]
    async with running(memory=lambda: available[0]) as pool, pool.pool.open(spec()):
        pool.prepare()
        await trio.sleep(1000)
        assert pool.standbys == []
        available[0] += 1
        await trio.sleep(standby_pool.MEMORY_SECONDS + 1)
        assert pool.statistics.prepared == 1
        available[0] = 0
        pool.prepare(EngineConfig(num_blocks=16, standby_workers=1))
        await trio.sleep(10)
        assert pool.statistics.prepared == 1


async def test_pause_ends_all_standbys_until_prepare(autojump_clock: MockClock) -> None:
    async with running() as pool, pool.pool.open(spec()) as worker:
        pool.prepare()
        await trio.sleep(10)
        (standby,) = pool.standbys
        await pool.pool.pause()
        assert not standby.alive()
        assert isinstance(standby.sent[-1], Stopped)  # in order
        await trio.sleep(1000)
        assert pool.standbys == [standby]
        assert worker.alive()
        pool.prepare()
        await trio.sleep(10)
        assert pool.statistics == StandbyStatistics(1, 0, 0, 0, ())


async def test_pause_ends_a_standby_that_is_being_prepared(autojump_clock: MockClock) -> None:
    behaviour = FakeBehaviour(hang_on=lambda message: isinstance(message, Prepare))
    async with running(behaviour) as pool, pool.pool.open(spec()):
        pool.prepare()
        await trio.sleep(10)
        began = trio.current_time()
        await pool.pool.pause()
        assert trio.current_time() == began
        assert not pool.standbys[0].alive()


async def test_standbys_are_stopped_in_order_and_all_at_once(autojump_clock: MockClock) -> None:
    behaviour = FakeBehaviour(stop_seconds=0.3)
    async with running(behaviour) as pool, pool.pool.open(spec(0)), pool.pool.open(spec(1)):
        pool.prepare()
        await trio.sleep(10)
        standbys = pool.standbys
        began = trio.current_time()
    assert trio.current_time() - began < 0.7  # not one after the other; and the workers, killed
    for standby in standbys:
        assert isinstance(standby.received[-1], Stop)
        assert isinstance(standby.sent[-1], Stopped)


async def test_without_its_task_the_pool_is_a_plain_transport(autojump_clock: MockClock) -> None:
    workers = FakeWorkers()
    pool = StandbyPool(workers.open)
    async with pool.open(spec()) as worker:
        pool.prepare(CONFIG, MODEL, 0)
        await start(worker)
        await trio.sleep(10)
        assert workers.started == [worker]


async def test_a_failed_preparation_is_a_loss(autojump_clock: MockClock) -> None:
    async with running() as pool, pool.pool.open(WorkerSpec(RankSpec(), "no.such:Runner")):
        pool.prepare()
        await trio.sleep(1.5)
        assert pool.statistics.lost_total == 1
        assert not any(isinstance(message, Prepared) for message in pool.standbys[0].sent)
