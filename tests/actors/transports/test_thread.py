"""Worker threads: what differs from processes is what cannot be forced."""

import threading

import pytest
import trio

from ullm.actors.transports.thread import open_thread
from ullm.errors import WorkerLost
from ullm.protocol.messages import Failed, Progress
from ullm.testing import ScriptedRunner


class Gate:
    """What a runner of this module waits for in `load`; one per test."""

    def __init__(self):
        self.opened = threading.Event()
        self.closed = threading.Event()


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()

    class Waits(ScriptedRunner):
        def load(self, start, progress):
            progress(Progress("waiting"))
            assert gate.opened.wait(30)
            return super().load(start, progress)

        def close(self):
            gate.closed.set()
            return super().close()

    class Fails(ScriptedRunner):
        def submit(self, step):
            raise ValueError("no")

        def close(self):
            gate.closed.set()
            raise RuntimeError("nor this")

    import ullm.testing

    monkeypatch.setattr(ullm.testing, "Waits", Waits, raising=False)
    monkeypatch.setattr(ullm.testing, "Fails", Fails, raising=False)
    yield gate
    gate.opened.set()
    assert gate.closed.wait(30)


async def waiting(worker, talk):
    await worker.send(talk.start())
    while (await talk.until(worker, Progress)).stage != "waiting":
        pass


def spec(talk, name):
    return type(talk.spec())(talk.spec().rank, f"ullm.testing:{name}")


async def test_hanging_thread_is_abandoned_within_the_budget(talk, gate):
    async with open_thread(spec(talk, "Waits")) as worker:
        assert worker.pid is None
        await waiting(worker, talk)
        report = await worker.stop(0.1)
        assert report.outcome == "abandoned"
        assert 0.05 <= report.seconds < 0.2
        assert not worker.alive()
        with pytest.raises(WorkerLost, match="cannot be killed"):
            await worker.receive()


async def test_abandoned_thread_that_comes_back_is_not_heard_and_ends(talk, gate):
    async with open_thread(spec(talk, "Waits")) as worker:
        await waiting(worker, talk)
        worker.kill()
        gate.opened.set()
        assert await trio.to_thread.run_sync(gate.closed.wait, 30)
        with pytest.raises(WorkerLost):
            await worker.receive()
        assert (await worker.stop(5)).outcome == "lost"


async def test_stop_while_loading_ends_at_the_next_sign_of_progress(talk, monkeypatch):
    seen = []

    class Loads(ScriptedRunner):
        def load(self, start, progress):
            for number in range(10**9):
                seen.append(number)
                progress(Progress("load"))

        def close(self):
            seen.append("closed")
            return {}

    import ullm.testing

    monkeypatch.setattr(ullm.testing, "Loads", Loads, raising=False)
    async with open_thread(spec(talk, "Loads")) as worker:
        await worker.send(talk.start())
        while (await talk.until(worker, Progress)).stage != "load":
            pass
        report = await worker.stop(5)
    assert report.seconds < 5
    assert report.outcome == "stopped"
    assert seen[-1] == "closed"


async def test_runner_is_gone_when_its_thread_has_stopped(talk, monkeypatch):
    """Freeing its weights must not go on while the interpreter may be ending."""
    gone = threading.Event()

    class Heavy(ScriptedRunner):
        def __del__(self):
            gone.set()

    import ullm.testing

    monkeypatch.setattr(ullm.testing, "Heavy", Heavy, raising=False)
    async with open_thread(spec(talk, "Heavy")) as worker:
        await talk.load(worker)
        await worker.stop(5)
        assert gone.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "replica0.rank0"]


async def test_leaving_does_not_wait_for_a_hanging_thread(talk, gate):
    with trio.fail_after(5):
        async with open_thread(spec(talk, "Waits")) as worker:
            await waiting(worker, talk)


async def test_failed_runner_is_closed_because_the_process_goes_on(talk, gate):
    async with open_thread(spec(talk, "Fails")) as worker:
        await talk.load(worker)
        await worker.send(talk.step())
        await talk.until(worker, Failed)
        with pytest.raises(WorkerLost):
            await worker.receive()
    assert gate.closed.is_set()


def test_thread_outlives_trio_without_harm(talk, gate):
    async def main():
        async with open_thread(spec(talk, "Waits")) as worker:
            await waiting(worker, talk)

    trio.run(main)
    gate.opened.set()
    assert gate.closed.wait(30)
    (thread,) = [t for t in threading.enumerate() if t.name == "replica0.rank0"] or [threading.Thread()]
    if thread.is_alive():
        thread.join(30)
    assert not thread.is_alive()
