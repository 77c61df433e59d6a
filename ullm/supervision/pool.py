"""Processes that take jobs from one queue, a line in, a line out; what a lost one had goes to another."""

from __future__ import annotations

import logging
import subprocess
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import trio

from ullm.supervision.actor import Reply
from ullm.supervision.control import Control
from ullm.supervision.errors import ActorLost, InvalidSpec, JobLost, ProcessFailed, root_cause
from ullm.supervision.policy import Restart
from ullm.supervision.process import LAST_WORDS, ProcessFunction, ProcessLife, kill_group
from ullm.supervision.shutdown import INFINITY, ChildReport
from ullm.supervision.spec import ChildInfo, ChildSpec, ChildStatus
from ullm.supervision.supervisor import NestedSupervisor, Supervisor, opened, supervisor_child

log = logging.getLogger("ullm.supervision")

LONGEST_ANSWER = 64 * 1024 * 1024
"""Bytes of an answer at most; a process that writes more without an end of line is one that has failed."""
SHOWN = 80
"""Characters of a line that an error message shows."""


@dataclass(frozen=True)
class PoolStatistics:
    """The state of a pool.

    Args:
        size: the processes that there should be.
        up: those that are ready for jobs, or at one.
        queued: jobs that wait for a process.
        running: jobs that a process has.
        answered: answers since the pool was started.
        repeated: how many times a job was queued again because its process was lost.
        lost: jobs that were given up for that reason.
    """

    size: int
    up: int
    queued: int
    running: int
    answered: int
    repeated: int
    lost: int


class _Job:
    """One line for a process, and the place for its answer."""

    def __init__(self, line: bytes) -> None:
        self.line = line
        self.reply: Reply[str] = Reply()
        self.losses = 0


class _Jobs:
    """The queue that the processes of a pool share.

    Args:
        name: of the pool.
        attempts: how many processes may be lost with one job.
    """

    def __init__(self, name: str, attempts: int) -> None:
        self.name = name
        self.queue: deque[_Job] = deque()
        self.running: set[_Job] = set()
        self.answered = self.repeated = self.lost = 0
        self._attempts = attempts
        self._closed = False
        self._idle = trio.lowlevel.ParkingLot()

    async def ask(self, line: bytes) -> str:
        """Queue a job and return its answer; see `Pool.ask`."""
        if self._closed:
            raise self._over()
        job = _Job(line)
        self.queue.append(job)
        self._idle.unpark()
        try:
            return await job.reply.wait()
        finally:
            job.reply.abandoned = True
            if job in self.queue:
                self.queue.remove(job)

    async def take(self) -> _Job:
        """Wait for a job and return it; one who is cancelled gets none, even if there is one."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.queue:
            await self._idle.park()
        job = self.queue.popleft()
        self.running.add(job)
        return job

    def answered_by_process(self, job: _Job, answer: str) -> None:
        """Pass an answer on."""
        self.running.discard(job)
        self.answered += 1
        job.reply.send(answer)

    def given_back(self, job: _Job, cause: BaseException) -> None:
        """Queue a job of a process that has ended again, before all others, or give it up.

        Args:
            cause: why it has ended.
        """
        self.running.discard(job)
        job.losses += 1
        if self._closed:
            job.reply.fail(self._over())
        elif job.losses >= self._attempts:
            self.lost += 1
            error = JobLost(self.name, job.losses, cause)
            error.__cause__ = cause
            job.reply.fail(error)
        elif not job.reply.abandoned:
            self.repeated += 1
            values = {"pool": self.name, "losses": job.losses}
            log.info("job queued again  pool=%(pool)s losses=%(losses)d", values)
            self.queue.appendleft(job)
            self._idle.unpark()

    def close(self) -> None:
        """Fail what is queued; what a process has may still be answered until that ends."""
        self._closed = True
        while self.queue:
            self.queue.popleft().reply.fail(self._over())

    def _over(self) -> ActorLost:
        return ActorLost(f"pool {self.name!r} has ended")


class _MemberLife(ProcessLife):
    """The life of one process of a pool: it gets a line, and the next line that it writes is the answer."""

    def __init__(
        self, function: _Member, process: trio.Process, task_status: trio.TaskStatus[trio.Process]
    ) -> None:
        super().__init__(function, process, task_status)
        assert process.stdin is not None, "it was opened with a pipe"
        self.stdin = process.stdin
        self._jobs = function.jobs
        self._timeout = function.answer_timeout
        self._job: _Job | None = None
        self._answered = trio.Event()
        self._may_begin = trio.Event()
        self._working = trio.CancelScope()
        self._waiting = trio.CancelScope()

    def _is_ready(self) -> None:
        super()._is_ready()
        self._may_begin.set()

    def heard(self, stream: str, line: bytes) -> None:
        """Take a line for the answer; what comes before it is ready is logged, and so is stderr.

        Raises:
            ProcessFailed: nobody asked for a line, or it is too long.
        """
        if stream != "stdout" or not self.ready:
            super().heard(stream, line)
            return
        text = line.decode("utf-8", "replace").rstrip("\r")
        if self._job is None:  # the next answer would be taken for that of another job
            raise ProcessFailed(self.child_id, f"wrote a line that no job asked for: {text[:SHOWN]!r}", None)
        if len(line) >= LONGEST_ANSWER:
            raise ProcessFailed(self.child_id, f"wrote a line of {LONGEST_ANSWER} bytes or more", None)
        job, self._job = self._job, None
        self._jobs.answered_by_process(job, text)
        self._answered.set()

    async def work(self) -> None:
        """Give the process one job after another. A stop waits for an answer, but takes no further job."""
        with self._working:
            await self._may_begin.wait()
            while True:
                self._job, self._answered = await self._jobs.take(), trio.Event()
                with trio.CancelScope(shield=True) as self._waiting:
                    await self._have_answered(self._job)

    async def _have_answered(self, job: _Job) -> None:
        with trio.move_on_after(self._timeout):
            try:
                await self.stdin.send_all(job.line + b"\n")
            except trio.BrokenResourceError:  # most likely it has ended, which is heard beside this
                await trio.sleep(LAST_WORDS)
                raise ProcessFailed(self.child_id, "has closed its input", None) from None
            await self._answered.wait()
            return
        if self.process.returncode is None:
            kill_group(self.process)
        what = f"did not answer within {self._timeout:g} s and was killed"
        raise ProcessFailed(self.child_id, what, None)

    def over(self) -> None:
        """Wait no longer for an answer."""
        self._working.cancel()
        self._waiting.cancel()

    def ended(self, cause: BaseException) -> None:
        """Give back the job that it had, if it had one."""
        if self._job is not None:
            self._jobs.given_back(self._job, cause)


@dataclass(frozen=True)
class _Member(ProcessFunction):
    """The async function of one process of a pool.

    Args:
        jobs: the pool's.
        answer_timeout: seconds.
    """

    jobs: _Jobs
    answer_timeout: float

    stdin: ClassVar[int] = subprocess.PIPE
    longest_line: ClassVar[int] = LONGEST_ANSWER

    async def __call__(self, *, task_status: trio.TaskStatus[trio.Process]) -> None:
        """Run the process to its end, and have it do jobs."""
        process = await self._open()
        life = _MemberLife(self, process, task_status)
        try:
            await self._run(process, life)
        except BaseException as error:
            life.ended(root_cause(error))
            raise
        finally:
            with trio.CancelScope(shield=True):
                await life.stdin.aclose()
        life.ended(ActorLost(f"the process of child {self.child_id!r} ended"))


class Pool:
    """A running pool of processes, the value of a child made by `pool_child`."""

    def __init__(self, supervisor: Supervisor, jobs: _Jobs) -> None:
        self._supervisor = supervisor
        self._jobs = jobs

    def __repr__(self) -> str:
        return f"<Pool {self._jobs.name!r} {self.statistics()}>"

    async def ask(self, job: str) -> str:
        """Have a process do a job, and return its answer.

        Jobs are begun in the order in which they come; each waits until a process is free. Cancelling the
        caller of a job that was not begun takes it back; the answer of one that was begun is dropped.

        Args:
            job: one line, such as JSON, without its end.

        Raises:
            JobLost: the pool's ``attempts`` processes were lost with this job.
            ActorLost: the pool has ended, or ends before the job is done.
            ValueError: the job is more than one line.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if "\n" in job or "\r" in job:
            raise ValueError(f"a job must be one line, got {job[:SHOWN]!r}")
        return await self._jobs.ask(job.encode())

    def statistics(self) -> PoolStatistics:
        """Return the state of the pool as a frozen value."""
        children, jobs = self._supervisor.which_children(), self._jobs
        return PoolStatistics(
            size=len(children),
            up=sum(child.status is ChildStatus.RUNNING for child in children),
            queued=len(jobs.queue),
            running=len(jobs.running),
            answered=jobs.answered,
            repeated=jobs.repeated,
            lost=jobs.lost,
        )

    def which_children(self) -> tuple[ChildInfo, ...]:
        """Return the pool's processes as they are now; the value of each is its `trio.Process`."""
        return self._supervisor.which_children()

    @property
    def reports(self) -> tuple[ChildReport, ...]:
        """A report of each process, in the order in which they were stopped; empty until then."""
        return self._supervisor.reports


@dataclass(frozen=True)
class _PoolFunction:
    """The async function that a child made by `pool_child` runs.

    Args:
        nested: that of the supervisor that the pool is.
        members: without their queue: each life of the pool has its own.
    """

    nested: NestedSupervisor
    members: Sequence[ChildSpec]
    attempts: int
    answer_timeout: float

    async def __call__(self, *, task_status: trio.TaskStatus[Pool]) -> None:
        """Start the processes, and have them do jobs until it is stopped or gives up."""
        jobs = _Jobs(self.nested.name, self.attempts)
        members = [self._with_queue(member, jobs) for member in self.members]
        try:
            async with opened(Control(self.nested.name, members, self.nested.flags), INFINITY) as supervisor:
                try:
                    task_status.started(Pool(supervisor, jobs))
                    await supervisor.wait_stopped()
                finally:
                    jobs.close()
        finally:
            jobs.close()

    def _with_queue(self, member: ChildSpec, jobs: _Jobs) -> ChildSpec:
        function = member.run
        assert isinstance(function, ProcessFunction), "pool_child has seen to it"
        given = {field.name: getattr(function, field.name) for field in fields(ProcessFunction)}
        given |= {"child_id": member.child_id, "jobs": jobs, "answer_timeout": self.answer_timeout}
        return replace(member, run=_Member(**given))


def pool_child(
    child_id: str,
    member: ChildSpec,
    size: int,
    *,
    attempts: int = 2,
    answer_timeout: float = INFINITY,
    **options: Any,
) -> ChildSpec:
    """Return the specification of a child that is a pool of processes with one queue of jobs.

    Its value is a `Pool`, whose `Pool.ask` has a job done. A process reads a line from its stdin, does what
    it says, and writes one line to its stdout, again and again. It is a supervisor: a process that is lost
    is started again, by the rule one_for_one.

    Args:
        member: how to run one process, made by `ChildSpec.process`; the processes are called as it is, with
            a number. Its lines on stderr are logged, and so are those before its ``ready_line``.
        size: number of processes.
        attempts: how many processes may be lost with one job before it has failed. 1 for jobs that must not
            be begun twice.
        answer_timeout: seconds after which a process that has not answered is killed, and lost.
        options: those of `supervisor_child` but for ``strategy``, ``auto_shutdown`` and ``max_children``.
            ``intensity`` is ``size`` times ``attempts`` unless given.

    Raises:
        InvalidSpec: a value makes no sense.
    """
    _check(child_id, member, size, attempts, answer_timeout)
    if not {"strategy", "auto_shutdown", "max_children"}.isdisjoint(options):
        raise InvalidSpec(f"child {child_id!r}: a pool takes no strategy, auto_shutdown or max_children")
    options.setdefault("intensity", size * attempts)
    members = [replace(member, child_id=f"{member.child_id}-{number}") for number in range(1, size + 1)]
    spec = supervisor_child(child_id, members, **options)
    assert isinstance(spec.run, NestedSupervisor), "made by supervisor_child"
    return replace(spec, run=_PoolFunction(spec.run, members, attempts, answer_timeout))


def _check(child_id: str, member: ChildSpec, size: int, attempts: int, answer_timeout: float) -> None:
    if not isinstance(member, ChildSpec) or not isinstance(member.run, ProcessFunction):
        raise InvalidSpec(f"child {child_id!r}: member must be made by ChildSpec.process, got {member!r}")
    if member.restart is not Restart.PERMANENT or member.name is not None:
        raise InvalidSpec(f"child {child_id!r}: member must be permanent and have no name")
    if not size >= 1:
        raise InvalidSpec(f"child {child_id!r}: size must be at least 1, got {size}")
    if not attempts >= 1:
        raise InvalidSpec(f"child {child_id!r}: attempts must be at least 1, got {attempts}")
    if not answer_timeout > 0:
        got = f"got {answer_timeout}"
        raise InvalidSpec(f"child {child_id!r}: answer_timeout must be more than 0 seconds, {got}")
