"""Fake workers: virtual time, and everything that a test may want to go wrong."""

import pytest
import trio
import trio.testing

from ullm.actors.transports.fake import FakeBehaviour, FakeWorkers
from ullm.errors import OutOfMemory, WorkerLost
from ullm.protocol.messages import (
    Asleep,
    Awake,
    Failed,
    Ping,
    Pong,
    Sleep,
    Start,
    Step,
    StepResult,
    Stop,
    Wake,
)
from ullm.testing import scripted_tokens


async def test_time_is_virtual(talk, autojump_clock):
    workers = FakeWorkers(FakeBehaviour(load_seconds=60, step_seconds=10, stop_seconds=3))
    async with workers.open(talk.spec()) as worker:
        began = trio.current_time()
        await talk.load(worker)
        assert trio.current_time() - began == pytest.approx(60)
        await worker.send(talk.step(0))
        await worker.send(talk.step(1))
        await worker.receive()
        assert trio.current_time() - began == pytest.approx(70)
        await worker.receive()
        assert trio.current_time() - began == pytest.approx(80)
        report = await worker.stop(5)
        assert (report.outcome, report.seconds) == ("stopped", pytest.approx(3))


async def test_sleeping_and_waking_take_their_time(talk, autojump_clock):
    workers = FakeWorkers(FakeBehaviour(sleep_seconds=2, wake_seconds=5))
    async with workers.open(talk.spec()) as worker:
        await talk.load(worker)
        began = trio.current_time()
        await worker.send(Sleep(1))
        await talk.until(worker, Asleep)
        assert trio.current_time() - began == pytest.approx(2)
        await worker.send(Wake())
        await talk.until(worker, Awake)
        assert trio.current_time() - began == pytest.approx(7)


async def test_death_at_any_time(talk, autojump_clock):
    workers = FakeWorkers(FakeBehaviour(step_seconds=10))
    async with workers.open(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(talk.step(0))
        await trio.sleep(5)
        workers.started[0].die("was killed by SIGBUS")
        with pytest.raises(WorkerLost, match="was killed by SIGBUS"):
            await worker.receive()
        assert not worker.alive()


async def test_death_by_a_message(talk):
    behaviour = FakeBehaviour(die_on=lambda message: isinstance(message, Step) and message.step_id == 1)
    async with FakeWorkers(behaviour).open(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(talk.step(0))
        await worker.send(talk.step(1))
        assert (await worker.receive()).step_id == 0
        with pytest.raises(WorkerLost, match="SIGKILL"):
            await worker.receive()


async def test_hang_and_late_answers(talk, autojump_clock):
    workers = FakeWorkers(FakeBehaviour(hang_on=lambda message: isinstance(message, Step)))
    async with workers.open(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(talk.step(0))
        with trio.move_on_after(1000) as scope:
            await worker.receive()
        assert scope.cancelled_caught
        assert worker.alive()
        workers.started[0].resume()
        assert (await worker.receive()).step_id == 0


async def test_hanging_worker_is_killed_at_the_end_of_the_budget(talk, autojump_clock):
    workers = FakeWorkers(FakeBehaviour(hang_on=lambda message: isinstance(message, Stop)))
    async with workers.open(talk.spec()) as worker:
        await talk.load(worker)
        report = await worker.stop(4)
        assert (report.outcome, report.seconds, report.timings) == ("killed", pytest.approx(4), {})


async def test_failing_load(talk, autojump_clock):
    workers = FakeWorkers(FakeBehaviour(load_seconds=1, load_error=OutOfMemory("no room")))
    async with workers.open(talk.spec()) as worker:
        await worker.send(talk.start())
        assert (await talk.until(worker, Failed)).kind == "OutOfMemory"
        with pytest.raises(WorkerLost):
            await worker.receive()


async def test_behaviour_by_spec(talk):
    def behaviour(spec):
        return FakeBehaviour(die_on=lambda message: spec.rank.rank == 1 and isinstance(message, Start))

    workers = FakeWorkers(behaviour)
    async with workers.open(talk.spec(rank=0)) as first, workers.open(talk.spec(rank=1)) as second:
        await talk.load(first)
        with pytest.raises(WorkerLost):
            await talk.load(second)
    assert [worker.name for worker in workers.started] == ["replica0.rank0", "replica0.rank1"]


async def test_duplicates_and_strangers(talk):
    workers = FakeWorkers()
    async with workers.open(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(talk.step(0))
        result = await worker.receive()
        assert result.sampled[0].token_ids == scripted_tokens(talk.PROMPT, talk.GREEDY, 1)
        fake = workers.started[0]
        fake.emit(result)
        fake.emit(StepResult(99, []))
        assert await worker.receive() == result
        assert (await worker.receive()).step_id == 99
        await worker.send(Ping(1))
        assert await worker.receive() == Pong(1)
        assert [type(message) for message in fake.received] == [Start, Step, Ping]
        assert fake.sent[-1] == Pong(1)


async def test_emit_after_death_says_nothing(talk):
    workers = FakeWorkers()
    async with workers.open(talk.spec()) as worker:
        workers.started[0].die("was killed by SIGKILL")
        workers.started[0].emit(Pong(1))
        with pytest.raises(WorkerLost):
            await talk.until(worker, Pong)
    workers.started[0].emit(Pong(2))
    await trio.testing.wait_all_tasks_blocked()
