"""Behaviour that all kinds of workers share."""

import sys
from contextlib import suppress

import pytest
import trio
import trio.testing

from ullm.actors.transports import WorkerSpec, open_transport
from ullm.errors import ConfigError, WorkerLost
from ullm.protocol.messages import (
    Asleep,
    Awake,
    Failed,
    NotUnderstood,
    Ping,
    Pong,
    Progress,
    RankSpec,
    Ready,
    Sleep,
    StepResult,
    Stopped,
    Wake,
)
from ullm.supervision.actor import cleanup_scope
from ullm.testing import scripted_tokens

KINDS = [pytest.param("process", marks=pytest.mark.process), "thread", "fake"]
"""Ray's is tried out by tests/e2e/test_ray.py: its library keeps descriptors and threads in the process."""
BUDGET = 5.0


@pytest.fixture(params=KINDS)
def open_worker(request):
    return open_transport(request.param)


async def test_load_step_and_ping_are_answered(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        assert worker.name == "replica0.rank0"
        assert worker.alive()
        await worker.send(talk.start("vocab_size=300"))
        assert isinstance(await worker.receive(), Progress)
        ready = await talk.until(worker, Ready)
        assert (ready.info.vocab_size, ready.info.num_blocks, ready.info.block_size) == (300, 16, 16)
        await worker.send(talk.step())
        result = await worker.receive()
        assert isinstance(result, StepResult)
        assert result.sampled[0].token_ids != scripted_tokens(
            talk.PROMPT, talk.GREEDY, 1
        )  # another vocabulary
        await worker.send(Ping(7))
        assert await worker.receive() == Pong(7)


async def test_answers_come_in_order(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        for step_id in range(10):
            await worker.send(talk.step(step_id))
        await worker.send(Ping(1))
        answers = [await worker.receive() for _ in range(11)]
        assert [answer.step_id for answer in answers[:10]] == list(range(10))
        assert answers[10] == Pong(1)


async def test_tokens_are_those_of_the_script(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        result = await worker.receive()
        assert result.sampled[0].token_ids == scripted_tokens(talk.PROMPT, talk.GREEDY, 1)


async def test_sleeps_and_wakes(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        ready = await talk.load(worker)
        await worker.send(talk.step())
        before = await worker.receive()
        for level in (1, 2):
            await worker.send(Sleep(level))
            asleep = await talk.until(worker, Asleep)
            assert list(asleep.given_back) == ["kv_cache", "weights"][:level]
        await worker.send(Ping(1))
        assert await worker.receive() == Pong(1)
        await worker.send(Wake())
        assert (await talk.until(worker, Awake)).info == ready.info
        await worker.send(talk.step())
        assert (await worker.receive()).sampled == before.sampled


async def test_failing_load_is_reported_with_its_kind(open_worker, talk):
    async with open_worker(talk.spec("RaisesInLoad")) as worker:
        await worker.send(talk.start())
        failed = await talk.until(worker, Failed)
        assert (failed.kind, failed.message) == (
            "ModelFileBroken",
            "model.safetensors: truncated after 3 bytes",
        )
        assert "RaisesInLoad" in failed.traceback or "in load" in failed.traceback
        with pytest.raises(WorkerLost):
            await worker.receive()
        assert not worker.alive()


async def test_failing_step_is_reported_in_one_line_and_ends_the_worker(open_worker, talk):
    async with open_worker(talk.spec("RaisesInStep")) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        failed = await worker.receive()
        assert (failed.kind, failed.message) == ("ZeroDivisionError", "first line")
        with pytest.raises(WorkerLost):
            await worker.receive()
        with pytest.raises(WorkerLost):
            await worker.send(Ping(1))


@pytest.mark.parametrize("path", ["nowhere:Runner", "ullm.testing:Nothing", "ullm.testing", ":", "ullm..x:y"])
async def test_runner_that_cannot_be_imported_is_reported(open_worker, path):
    async with open_worker(WorkerSpec(RankSpec(), path)) as worker:
        message = await worker.receive()
        while not isinstance(message, Failed):
            message = await worker.receive()
        assert message.kind == "ResourceUnavailable"
        assert repr(path) in message.message


async def test_message_of_another_language_is_answered_and_ignored(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        await worker.send(Pong(3))
        answer = await worker.receive()
        assert isinstance(answer, NotUnderstood)
        assert "Pong" in answer.detail
        await worker.send(Ping(1))
        assert await worker.receive() == Pong(1)


async def test_step_before_start_and_second_start_are_answered(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        await worker.send(talk.step())
        assert (await talk.until(worker, NotUnderstood)).detail == "Step came before Start"
        await talk.load(worker)
        await worker.send(talk.start())
        assert (await worker.receive()).detail == "Start came twice"


async def test_orderly_stop(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        report = await worker.stop(BUDGET)
        assert (report.name, report.outcome) == ("replica0.rank0", "stopped")
        assert report.timings == {"kv": 0.0, "weights": 0.0}
        assert report.seconds < BUDGET
        assert not worker.alive()
        with pytest.raises(WorkerLost):
            await worker.send(Ping(1))


async def test_stop_before_start(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        # Until its imports are done, it hears nothing.
        assert (await worker.stop(6 * BUDGET)).outcome == "stopped"


async def test_stop_while_another_task_receives(open_worker, talk):
    async with open_worker(talk.spec()) as worker, trio.open_nursery() as nursery:
        await talk.load(worker)
        received = []

        async def receive():
            with suppress(WorkerLost):
                while True:
                    received.append(await worker.receive())

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        report = await worker.stop(BUDGET)
        assert report.outcome == "stopped"
        assert report.timings == {"kv": 0.0, "weights": 0.0}
    assert [type(message) for message in received] == [Stopped]


async def test_stop_finishes_the_steps_that_were_sent(open_worker, talk):
    async with open_worker(talk.spec()) as worker, trio.open_nursery() as nursery:
        await talk.load(worker)
        received = []

        async def receive():
            with suppress(WorkerLost):
                while True:
                    received.append(await worker.receive())

        for step_id in range(3):
            await worker.send(talk.step(step_id))
        nursery.start_soon(receive)
        await worker.stop(BUDGET)
    assert [type(message) for message in received] == [StepResult] * 3 + [Stopped]


async def test_stop_of_a_dead_worker(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        worker.kill()
        with pytest.raises(WorkerLost):
            await worker.receive()
        report = await worker.stop(BUDGET)
        assert report.outcome == "lost"


async def test_second_stop_says_the_same(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        first, second = await worker.stop(BUDGET), await worker.stop(BUDGET)
        assert first.outcome == second.outcome == "stopped"


async def test_killed_worker_is_lost(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        worker.kill()
        worker.kill()
        with pytest.raises(WorkerLost, match=r"replica0\.rank0 was "):
            await worker.receive()
        assert not worker.alive()
        with pytest.raises(WorkerLost):
            await worker.send(Ping(1))


async def test_error_of_the_body_is_raised_as_it_was(open_worker, talk):
    error = WorkerLost("someone", "is gone")
    with pytest.raises(WorkerLost) as caught:
        async with open_worker(talk.spec()):
            raise error
    assert caught.value is error


async def test_cancelled_body_leaves_nothing_behind(open_worker, talk):
    with trio.move_on_after(0.05) as scope:
        async with open_worker(talk.spec()) as worker:
            await talk.load(worker)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not worker.alive()


async def test_stop_in_the_cleanup_of_a_cancelled_body(open_worker, talk):
    reports = []
    with trio.CancelScope() as scope:
        async with open_worker(talk.spec()) as worker:
            await talk.load(worker)
            try:
                scope.cancel()
                await worker.receive()
            finally:
                with cleanup_scope():
                    reports.append(await worker.stop(BUDGET))
    assert [(report.outcome, report.timings) for report in reports] == [
        ("stopped", {"kv": 0.0, "weights": 0.0})
    ]


async def test_cancelled_receive_loses_no_message(open_worker, talk):
    async with open_worker(talk.spec()) as worker:
        await talk.load(worker)
        for number in range(50):
            with trio.CancelScope() as scope:
                scope.cancel()
                await worker.receive()
            await worker.send(Ping(number))
            assert await worker.receive() == Pong(number)


async def test_workers_do_not_mix(open_worker, talk):
    async with open_worker(talk.spec(rank=0)) as first, open_worker(talk.spec(rank=1)) as second:
        assert [first.name, second.name] == ["replica0.rank0", "replica0.rank1"]
        await talk.load(first)
        await talk.load(second)
        await first.send(Ping(1))
        await second.send(Ping(2))
        assert await second.receive() == Pong(2)
        assert await first.receive() == Pong(1)


def test_unknown_kind_is_a_config_error():
    with pytest.raises(ConfigError, match="process, thread"):
        open_transport("carrier pigeon")


def test_missing_library_is_a_config_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ullm.actors.transports.ray", raising=False)
    with pytest.raises(ConfigError, match=r"needs Ray .*pip install 'ullm-engine\[ray\]'"):
        open_transport("ray")
