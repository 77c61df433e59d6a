"""A pool of processes: one queue, jobs that go on after a loss, and an end that leaves nobody waiting."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock, memory_stream_one_way_pair, wait_all_tasks_blocked

from ullm.supervision import (
    ActorLost,
    ChildSpec,
    InvalidSpec,
    JobLost,
    Pool,
    ProcessFailed,
    Restart,
    RestartLimitReached,
    Strategy,
    Supervisor,
    open_supervisor,
    pool_child,
)

Answer = Callable[["FakeProcess", str], str | None]


class FakeProcess:
    """A process in memory: it answers each line as it is told, None: never, and ends when it is told."""

    def __init__(self, answer: Answer, number: int) -> None:
        self.number = self.pid = number
        self.returncode: int | None = None
        self.stdin, self._input = memory_stream_one_way_pair()
        self._output, self.stdout = memory_stream_one_way_pair()
        self.stderr = None
        self.got: list[str] = []
        self.ignores = False
        self._answer = answer
        self._ended = trio.Event()

    async def live(self) -> None:
        rest = b""
        with suppress(trio.ClosedResourceError):  # it has ended
            async for data in self._input:
                *lines, rest = (rest + data).split(b"\n")
                for line in map(bytes.decode, lines):
                    await self._do(line)

    async def _do(self, line: str) -> None:
        self.got.append(line)
        answer = self._answer(self, line)
        if self.returncode is None and answer is not None:
            await self.write(answer)

    async def write(self, line: str) -> None:
        await self._output.send_all(line.encode() + b"\n")

    def end(self, returncode: int) -> None:
        if self.returncode is None:
            self.returncode = returncode
            self._output.close()
            self._input.close()
            self._ended.set()

    async def wait(self) -> int | None:
        await self._ended.wait()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if not self.ignores:
            self.end(-signum)


def doubled(process: FakeProcess, line: str) -> str | None:
    """What processes do with a line: double it; ``die``: end; ``hang``: nothing."""
    if line == "die":
        process.end(5)
    return None if line == "hang" else line * 2


class Processes(list[FakeProcess]):
    """All processes that were started, in order."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__()
        self.answer: Answer = doubled
        self._nursery = nursery

    async def open(self, command: list[str], **options: Any) -> FakeProcess:
        await trio.lowlevel.checkpoint()
        self.append(FakeProcess(self.answer, len(self) + 1))
        self._nursery.start_soon(self[-1].live)
        return self[-1]


@pytest.fixture
async def processes(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> Processes:
    processes = Processes(nursery)
    monkeypatch.setattr("trio.lowlevel.open_process", processes.open)
    monkeypatch.setattr("ullm.supervision.pool.kill_group", lambda process: process.end(-9))
    monkeypatch.setattr("ullm.supervision.process.kill_group", lambda process: process.end(-9))
    return processes


MEMBER = ChildSpec.process("worker", ["worker"])


def pool_of(supervisor: Supervisor) -> Pool:
    pool = supervisor.which_children()[0].value
    assert isinstance(pool, Pool)
    return pool


class Asker:
    """Jobs asked side by side, with what became of each: an answer or an exception."""

    def __init__(self, pool: Pool, nursery: trio.Nursery) -> None:
        self.outcomes: dict[str, str | Exception] = {}
        self._pool = pool
        self._nursery = nursery

    async def ask(self, *jobs: str) -> None:
        for job in jobs:
            self._nursery.start_soon(self._ask, job)
            await wait_all_tasks_blocked()

    async def _ask(self, job: str) -> None:
        try:
            self.outcomes[job] = await self._pool.ask(job)
        except Exception as error:
            self.outcomes[job] = error


async def test_jobs_are_begun_in_order_by_whoever_is_free(processes: Processes) -> None:
    processes.answer = lambda process, line: None
    async with (
        open_supervisor("root", [pool_child("pool", MEMBER, 2)]) as supervisor,
        trio.open_nursery() as n,
    ):
        pool = pool_of(supervisor)
        asker = Asker(pool, n)
        await asker.ask("a", "b", "c", "d")
        assert [process.got for process in processes] == [["a"], ["b"]]
        assert (pool.statistics().queued, pool.statistics().running) == (2, 2)
        await processes[1].write("B")
        await wait_all_tasks_blocked()
        assert [process.got for process in processes] == [["a"], ["b", "c"]]
        for process in (processes[0], processes[1], processes[0]):
            await process.write(process.got[-1].upper())
            await wait_all_tasks_blocked()
    assert asker.outcomes == {job: job.upper() for job in "abcd"}
    statistics = pool.statistics()
    assert (statistics.size, statistics.answered, statistics.queued, statistics.running) == (2, 4, 0, 0)


async def test_a_job_whose_process_is_lost_is_done_by_another_before_all_others(processes: Processes) -> None:
    processes.answer = lambda process, line: None if process.number == 1 else line.upper()
    async with (
        open_supervisor("root", [pool_child("pool", MEMBER, 1)]) as supervisor,
        trio.open_nursery() as n,
    ):
        pool = pool_of(supervisor)
        asker = Asker(pool, n)
        await asker.ask("a", "b")
        processes[0].end(1)
        await wait_all_tasks_blocked()
        assert (processes[0].got, processes[1].got) == (["a"], ["a", "b"])
        assert asker.outcomes == {"a": "A", "b": "B"}
        assert pool.statistics().repeated == 1


@pytest.mark.parametrize(("attempts", "times"), [(1, "once"), (3, "3 times")])
async def test_a_job_that_ends_each_process_is_given_up(
    processes: Processes, attempts: int, times: str
) -> None:
    async with open_supervisor("root", [pool_child("pool", MEMBER, 1, attempts=attempts)]) as supervisor:
        pool = pool_of(supervisor)
        with pytest.raises(JobLost) as caught:
            await pool.ask("die")
        assert await pool.ask("b") == "bb"
        assert pool.statistics().lost == 1
    assert str(caught.value) == (
        f"a job of pool 'pool' lost its process {times}; "
        "last cause: the process of child 'worker-1' ended with exit code 5"
    )
    assert isinstance(caught.value.cause, ProcessFailed)
    assert caught.value.cause.returncode == 5
    assert len(processes) == attempts + 1


async def test_an_answer_before_the_end_counts(processes: Processes) -> None:
    """A process may answer and end, such as after so many jobs."""

    def answer(process: FakeProcess, line: str) -> None:
        process.stdout.put_data(b"last\n")
        process.end(0)

    processes.answer = answer
    async with open_supervisor("root", [pool_child("pool", MEMBER, 1)]) as supervisor:
        pool = pool_of(supervisor)
        assert await pool.ask("a") == "last"
        assert pool.statistics().repeated == 0


async def test_a_process_that_does_not_answer_is_killed(processes: Processes) -> None:
    spec = pool_child("pool", MEMBER, 1, answer_timeout=7.0)
    async with open_supervisor("root", [spec]) as supervisor:
        began = trio.current_time()
        with pytest.raises(JobLost, match="'worker-1' did not answer within 7 s and was killed"):
            await pool_of(supervisor).ask("hang")
        assert trio.current_time() - began == pytest.approx(14.0, abs=1.0)
        await wait_all_tasks_blocked()
        assert [process.returncode for process in processes] == [-9, -9, None]


async def test_a_line_that_no_job_asked_for_is_a_failure(processes: Processes) -> None:
    """Otherwise it would be taken for the answer to the next job."""
    failures: list[str] = []
    spec = pool_child("pool", MEMBER, 1, on_failure=lambda child_id, error: failures.append(str(error)))
    async with open_supervisor("root", [spec]) as supervisor:
        await processes[0].write("hello")
        await wait_all_tasks_blocked()
        assert await pool_of(supervisor).ask("a") == "aa"
    assert failures == ["the process of child 'worker-1' wrote a line that no job asked for: 'hello'"]
    assert [process.got for process in processes] == [[], ["a"]]


async def test_lines_before_it_is_ready_are_no_answers(processes: Processes) -> None:
    member = ChildSpec.process("worker", ["worker"], ready_line="ready")

    async def begin(opened: Supervisor) -> None:
        await wait_all_tasks_blocked()
        await processes[0].write("warming up")
        await processes[0].write("ready")

    async with trio.open_nursery() as nursery:
        spec = pool_child("pool", member, 1)
        async with open_supervisor(
            "root", [spec], on_opened=lambda opened: nursery.start_soon(begin, opened)
        ) as supervisor:
            assert await pool_of(supervisor).ask("a") == "aa"
    assert len(processes) == 1


async def test_one_that_has_closed_its_input_is_replaced(processes: Processes) -> None:
    async with open_supervisor("root", [pool_child("pool", MEMBER, 1)]) as supervisor:
        processes[0]._input.close()
        assert await pool_of(supervisor).ask("a") == "aa"
    assert processes[0].returncode == -signal.SIGTERM
    assert len(processes) == 2


async def test_a_caller_who_leaves_takes_back_what_was_not_begun(processes: Processes) -> None:
    answers = {"a": None}
    processes.answer = lambda process, line: answers.get(line, line.upper())
    async with (
        open_supervisor("root", [pool_child("pool", MEMBER, 1)]) as supervisor,
        trio.open_nursery() as n,
    ):
        pool = pool_of(supervisor)
        asker = Asker(pool, n)
        await asker.ask("a")
        with trio.move_on_after(1) as left:
            await pool.ask("b")
        assert left.cancelled_caught
        await processes[0].write("A")
        await asker.ask("c")
    assert processes[0].got == ["a", "c"]
    assert asker.outcomes == {"a": "A", "c": "C"}


async def test_the_answer_to_a_caller_who_has_left_is_dropped(processes: Processes) -> None:
    processes.answer = lambda process, line: None
    async with (
        open_supervisor("root", [pool_child("pool", MEMBER, 1)]) as supervisor,
        trio.open_nursery() as n,
    ):
        pool = pool_of(supervisor)
        with trio.move_on_after(1):
            await pool.ask("a")
        asker = Asker(pool, n)
        await asker.ask("b")
        await processes[0].write("A")
        await wait_all_tasks_blocked()
        await processes[0].write("B")
    assert asker.outcomes == {"b": "B"}


async def test_a_stop_fails_what_is_queued_and_waits_for_what_was_begun(processes: Processes) -> None:
    """A process that ends its job when it is asked to stop has not done it for nothing."""
    processes.answer = lambda process, line: None
    stop = trio.Event()
    member = ChildSpec.process("worker", ["worker"], shutdown=10.0)
    async with trio.open_nursery() as nursery:
        async with open_supervisor("root", [pool_child("pool", member, 2)]) as supervisor:
            pool = pool_of(supervisor)
            asker = Asker(pool, nursery)
            await asker.ask("a", "b", "c")
            for process in processes:
                process.ignores = True
            supervisor.request_stop()
            await wait_all_tasks_blocked()
            assert set(asker.outcomes) == {"c"}
            await trio.sleep(5)  # processes end in reverse order, each within its budget
            await processes[1].write("B")
            processes[1].end(0)
            await trio.sleep(5)
            processes[0].end(3)
            stop.set()
    assert stop.is_set()
    assert asker.outcomes["b"] == "B"
    assert [repr(asker.outcomes[job]) for job in "ac"] == ["ActorLost(\"pool 'pool' has ended\")"] * 2
    assert [report.child_id for report in pool.reports] == ["worker-2", "worker-1"]
    with pytest.raises(ActorLost, match="pool 'pool' has ended"):
        await pool.ask("d")


async def test_a_pool_that_gives_up_leaves_nobody_waiting(processes: Processes) -> None:
    processes.answer = lambda process, line: None
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            spec = pool_child("pool", MEMBER, 1, attempts=9, intensity=2)
            async with open_supervisor("root", [spec], intensity=0) as supervisor:
                asker = Asker(pool_of(supervisor), nursery)
                await asker.ask("a", "b")
                for _ in range(3):
                    processes[-1].end(5)
                    await wait_all_tasks_blocked()
                pytest.fail("it must give up")
        except RestartLimitReached as caught:
            error = caught
    assert "more than 2 restarts" in str(error)
    assert {job: type(outcome) for job, outcome in asker.outcomes.items()} == {"a": ActorLost, "b": ActorLost}


async def test_values_that_make_no_sense(processes: Processes) -> None:
    async def task(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()

    temporary = ChildSpec.process("worker", ["worker"], restart=Restart.TEMPORARY)
    for member, options, message in (
        (ChildSpec("worker", task), {}, "member must be made by ChildSpec.process"),
        (temporary, {}, "member must be permanent and have no name"),
        (ChildSpec.process("worker", ["worker"], name="a"), {}, "member must be permanent and have no name"),
        (MEMBER, {"attempts": 0}, "attempts must be at least 1, got 0"),
        (MEMBER, {"answer_timeout": 0.0}, "answer_timeout must be more than 0 seconds, got 0"),
        (MEMBER, {"strategy": Strategy.ONE_FOR_ALL}, "a pool takes no strategy"),
    ):
        with pytest.raises(InvalidSpec, match=f"child 'pool': {message}"):
            pool_child("pool", member, 1, **options)
    with pytest.raises(InvalidSpec, match="size must be at least 1, got 0"):
        pool_child("pool", MEMBER, 0)
    async with open_supervisor("root", [pool_child("pool", MEMBER, 1)]) as supervisor:
        for job in ("a\nb", "a\rb"):
            with pytest.raises(ValueError, match="a job must be one line, got 'a"):
                await pool_of(supervisor).ask(job)


SQUARES = """\
import os, sys
print("ready", flush=True)
for line in sys.stdin:
    if line == "die\\n":
        os._exit(5)
    print(int(line) ** 2, flush=True)
"""


@pytest.mark.process
async def test_real_processes() -> None:
    member = ChildSpec.process("worker", [sys.executable, "-S", "-c", SQUARES], ready_line="ready")
    async with (
        open_supervisor("root", [pool_child("pool", member, 2, name="squares")]) as supervisor,
        trio.open_nursery() as nursery,
    ):
        pool: Pool = supervisor.whereis("squares")
        asker = Asker(pool, nursery)
        await asker.ask(*map(str, range(10)), "die", "9" * 400)
    assert isinstance(asker.outcomes.pop("die"), JobLost)
    assert asker.outcomes == {job: str(int(job) ** 2) for job in asker.outcomes}
    assert len(asker.outcomes) == 11
    assert all(child.value is None for child in pool.which_children())
