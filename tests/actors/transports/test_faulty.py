"""Each fault with each kind of worker: its effect on the worker, and what its group sees."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from ullm.actors.transports import OpenTransport, Transport, WorkerSpec, open_transport
from ullm.actors.transports.fake import FakeWorker
from ullm.actors.transports.faulty import Pipe, faulty, garbled
from ullm.actors.transports.process import ProcessTransport
from ullm.actors.transports.thread import ThreadTransport
from ullm.config import EngineConfig
from ullm.errors import FrameBroken, WorkerLost
from ullm.faults import FaultInjector
from ullm.protocol.frames import FrameReader
from ullm.protocol.messages import (
    Failed,
    FromWorker,
    NotUnderstood,
    Ping,
    Pong,
    Prepare,
    RankSpec,
    Ready,
    Sleep,
    Start,
    Step,
    StepResult,
    ToWorker,
    Wake,
)

PROCESS = pytest.param("process", marks=pytest.mark.process)
KINDS = [PROCESS, "thread", "fake"]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")

Messages = Any


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_faults(kind: str, plan: str) -> tuple[OpenTransport, FaultInjector]:
    injector = FaultInjector.from_text(plan, transport=kind)
    return faulty(open_transport(kind), injector), injector


# --- without faults ------------------------------------------------------------------------------


async def test_nothing_changes_where_nothing_is_armed(kind: str, talk: Messages) -> None:
    open_worker, injector = with_faults(kind, "")
    async with open_worker(talk.spec()) as worker:
        assert (worker.name, worker.alive(), worker.suspended()) == ("replica0.rank0", True, False)
        assert (worker.pid is not None) == (kind == "process")
        await talk.load(worker)
        await worker.send(talk.step())
        assert isinstance(await worker.receive(), StepResult)
        report = await worker.stop(5)
        assert (report.outcome, worker.alive()) == ("stopped", False)
    assert injector.describe().fired == []


async def test_kill_is_passed_on(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "worker.step:crash@nth=100")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        worker.kill()
        with pytest.raises(WorkerLost):
            await talk.until(worker, Pong)


# --- in the worker -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "cause"),
    [("crash", "was killed by SIGKILL"), ("exit", "exited with status 3")],
)
async def test_it_ends_without_a_word(kind: str, talk: Messages, action: str, cause: str) -> None:
    open_worker, injector = with_faults(kind, f"worker.step:{action}@nth=2")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(talk.step(0))
        assert isinstance(await worker.receive(), StepResult)
        await worker.send(talk.step(1))
        with pytest.raises(WorkerLost, match=f"replica0.rank0 {cause}"):
            await worker.receive()
        assert not worker.alive()
    assert [(fired.point, fired.action, fired.hit) for fired in injector.history] == [
        ("worker.step", action, 2)
    ]


@pytest.mark.parametrize(
    ("plan", "kinds"),
    [
        ("worker.step:raise", {"FaultInjected"}),
        ("worker.step:oom", {"MemoryError", "OutOfMemoryError"}),  # torch's own where it is imported
        ("worker.start:raise", {"FaultInjected"}),
        ("worker.start:oom", {"OutOfMemory"}),
    ],
)
async def test_it_fails_as_its_runner_would(kind: str, talk: Messages, plan: str, kinds: set[str]) -> None:
    open_worker, _ = with_faults(kind, plan)
    async with open_worker(talk.spec()) as worker:
        await worker.send(talk.start())
        if "start" not in plan:
            await talk.until(worker, Ready)
            await worker.send(talk.step())
        failed = await talk.until(worker, Failed)
        assert failed.kind in kinds
        assert "injected fault" in failed.message
        with pytest.raises(WorkerLost):
            await worker.receive()


async def test_it_is_slow(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "worker.ping:slow@seconds=0.3")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        began = trio.current_time()
        await worker.send(Ping(1))
        assert await worker.receive() == Pong(1)
        assert trio.current_time() - began >= 0.3


async def test_it_hangs_for_a_while(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "worker.ping:hang@seconds=0.3")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        began = trio.current_time()
        await worker.send(Ping(1))
        assert await worker.receive() == Pong(1)
        assert trio.current_time() - began >= 0.3


@pytest.mark.parametrize("kind", [PROCESS, "fake"], indirect=True)
async def test_it_hangs_for_ever_and_hears_no_stop(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "worker.ping:hang")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(Ping(1))
        report = await worker.stop(1)
        assert report.outcome == "killed"
        assert 0.9 <= report.seconds <= 2


@POSIX
@pytest.mark.parametrize("kind", [PROCESS, "fake"], indirect=True)
async def test_it_is_suspended(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "worker.step:stop")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        with trio.fail_after(60):
            while not worker.suspended():  # the kernel tells nobody  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert worker.alive()
        worker.kill()
        with pytest.raises(WorkerLost, match="SIGKILL"):
            await worker.receive()


async def test_it_fails_to_start_twice(kind: str, talk: Messages) -> None:
    open_worker, injector = with_faults(kind, "worker.start:crash@times=2")
    for epoch in (1, 2):
        async with open_worker(talk.spec()) as worker:
            await worker.send(restarted(talk.start(), epoch))
            with pytest.raises(WorkerLost, match="was killed by SIGKILL"):
                await talk.until(worker, Ready)
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
    assert [fired.epoch for fired in injector.history] == [1, 2]


def restarted(start: Start, epoch: int) -> Start:
    return msgspec.structs.replace(start, rank=RankSpec(epoch=epoch))


@pytest.mark.parametrize("kind", [PROCESS, "fake"], indirect=True)
async def test_it_misbehaves_when_it_shall_stop(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "worker.stop:hang")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        report = await worker.stop(1)
        assert report.outcome == "killed"
        assert report.seconds <= 2


async def test_a_lost_worker_hits_nothing_more(kind: str, talk: Messages) -> None:
    """Steps are sent ahead; one that is never carried out does not use up a fault."""
    open_worker, injector = with_faults(kind, "worker.step:crash@times=2")
    for epoch in (1, 2):
        async with open_worker(talk.spec()) as worker:
            await worker.send(restarted(talk.start(), epoch))
            await talk.until(worker, Ready)
            for number in range(2):
                with suppress(WorkerLost):
                    await worker.send(talk.step(number))
            with pytest.raises(WorkerLost):
                await talk.until(worker, StepResult)
    assert [(fired.epoch, fired.hit) for fired in injector.history] == [(1, 1), (2, 2)]


async def test_a_worker_that_is_gone_is_stopped_all_the_same(kind: str, talk: Messages) -> None:
    open_worker, injector = with_faults(kind, "worker.step:crash; worker.stop:hang")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        with pytest.raises(WorkerLost):
            await worker.receive()
        assert (await worker.stop(1)).outcome == "lost"
    assert [fired.point for fired in injector.history] == ["worker.step"]


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("worker.start", Start(EngineConfig(), RankSpec(), "")),
        ("worker.prepare", Prepare(EngineConfig(), RankSpec(), "")),
        ("worker.step", Step(1, [])),
        ("worker.ping", Ping(1)),
        ("worker.sleep", Sleep(1)),
        ("worker.wake", Wake()),
    ],
)
async def test_each_message_is_a_point(talk: Messages, point: str, message: ToWorker) -> None:
    open_worker, injector = with_faults("fake", f"{point}:crash")
    async with open_worker(talk.spec()) as worker:
        await worker.send(message)
        with pytest.raises(WorkerLost, match="SIGKILL"):
            await talk.until(worker, Failed)
    assert [fired.point for fired in injector.history] == [point]


async def test_a_worker_is_who_its_start_says() -> None:
    """A standby worker is started before it is known which worker it will replace."""
    open_worker, injector = with_faults("fake", "worker.step:crash@rank=1,replica=2,epoch=3")
    spec = msgspec.structs.replace(RankSpec(), replica=2, rank=1, epoch=3)
    async with open_worker(WorkerSpec(RankSpec(), "ullm.testing:ScriptedRunner")) as worker:
        await worker.send(Start(EngineConfig(num_blocks=4), spec, "scripted:"))
        await worker.send(Step(1, []))
        with pytest.raises(WorkerLost):
            await _until(worker.receive, StepResult)
    assert [(fired.replica, fired.rank, fired.epoch) for fired in injector.history] == [(2, 1, 3)]


async def _until(receive: Callable[[], Any], kind: type[FromWorker]) -> None:
    while not isinstance(await receive(), kind):
        pass


# --- frames --------------------------------------------------------------------------------------


async def test_a_frame_to_a_worker_is_dropped(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "frame.to_worker:drop@nth=2,message=Ping")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        for number in range(3):
            await worker.send(Ping(number))
        assert [await worker.receive(), await worker.receive()] == [Pong(0), Pong(2)]


async def test_a_frame_to_a_worker_is_doubled(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "frame.to_worker:duplicate@message=Ping")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(Ping(1))
        await worker.send(Ping(2))
        assert [await worker.receive() for _ in range(3)] == [Pong(1), Pong(1), Pong(2)]


@pytest.mark.parametrize(
    ("action", "expected"),
    [("drop", "Step 2 came after step 0"), ("duplicate", "Step 1 came after step 1")],
)
async def test_a_worker_refuses_steps_that_are_out_of_turn(
    kind: str, talk: Messages, action: str, expected: str
) -> None:
    """A step is a delta; carried out on another state it would be a wrong text, not an error."""
    open_worker, _ = with_faults(kind, f"frame.to_worker:{action}@message=Step,nth=2")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        for number in range(3):
            await worker.send(talk.step(number))
        refused = await talk.until(worker, NotUnderstood)
        assert refused.detail == expected


async def test_frames_are_late(talk: Messages, autojump_clock: MockClock) -> None:
    open_worker, _ = with_faults(
        "fake", "frame.to_worker:delay@message=Ping,seconds=3; frame.from_worker:delay@message=Pong,seconds=4"
    )
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(Ping(1))
        assert trio.current_time() == 3
        assert await worker.receive() == Pong(1)
        assert trio.current_time() == 7


async def test_a_receiver_that_gives_up_loses_no_late_frame(
    talk: Messages, autojump_clock: MockClock
) -> None:
    open_worker, _ = with_faults("fake", "frame.from_worker:delay@message=Pong,seconds=4")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(Ping(1))
        await worker.send(Ping(2))
        with trio.move_on_after(1) as scope:
            await worker.receive()
        assert scope.cancelled_caught
        assert [await worker.receive(), await worker.receive()] == [Pong(1), Pong(2)]
        assert trio.current_time() == 4


async def test_a_frame_from_a_worker_is_dropped_or_doubled(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(
        kind, "frame.from_worker:drop@message=Pong; frame.from_worker:duplicate@message=Pong,nth=2"
    )
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        for number in range(3):
            await worker.send(Ping(number))
        assert [await worker.receive() for _ in range(3)] == [Pong(1), Pong(1), Pong(2)]


async def test_a_fault_armed_while_a_frame_is_awaited_concerns_that_frame(talk: Messages) -> None:
    open_worker, injector = with_faults("fake", "")
    async with open_worker(talk.spec()) as worker, trio.open_nursery() as nursery:
        await talk.load(worker)
        nursery.start_soon(_until, worker.receive, Pong)
        await trio.testing.wait_all_tasks_blocked()
        injector.arm("frame.from_worker:drop@message=Pong")
        await worker.send(Ping(1))
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        await worker.send(Ping(2))


async def test_a_corrupt_frame_from_a_worker_costs_the_worker(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "frame.from_worker:corrupt@message=StepResult,nth=2")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        for number in range(3):
            await worker.send(talk.step(number))
        assert await number_of_result(worker) == 0
        with pytest.raises(WorkerLost, match="sent a frame that is not msgpack"):
            await worker.receive()
        await worker.stop(5)
        assert not worker.alive()


async def test_a_corrupt_frame_to_a_worker_costs_the_worker(kind: str, talk: Messages) -> None:
    open_worker, _ = with_faults(kind, "frame.to_worker:corrupt@message=Step,nth=2")
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        for number in range(2):
            await worker.send(talk.step(number))
        assert await number_of_result(worker) == 0
        failed = await talk.until(worker, Failed)
        assert failed.kind == "FrameBroken"
        assert "not msgpack" in failed.message


async def number_of_result(worker: Transport) -> int:
    message = await worker.receive()
    assert isinstance(message, StepResult)
    return message.step_id


def test_garbled_frames_are_never_messages() -> None:
    reader: FrameReader[ToWorker] = FrameReader(ToWorker)
    reader.feed(garbled(Step(7, [])))
    with pytest.raises(FrameBroken, match="not msgpack"):
        reader.next()


def test_only_processes_have_pipes() -> None:
    assert issubclass(ProcessTransport, Pipe)
    assert not issubclass(ThreadTransport, Pipe)
    assert not issubclass(FakeWorker, Pipe)
