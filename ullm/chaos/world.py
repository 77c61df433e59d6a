"""What faults act on: the server's processes and endpoints, and the requests in flight."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from ullm.chaos.catalogue import ChaosRequest
from ullm.chaos.chaos_client import AnswerOutcome, ChaosAnswer, send_request
from ullm.chaos.schedule import Moment
from ullm.client.http import Connection, Endpoint
from ullm.errors import ServerRefused, ServerUnreachable
from ullm.faults import FiredFault
from ullm.testing.processes import MeasuredServer, descendants, psutil_module

MAX_CRASHES = 2
"""Losses of workers after which a request runs alone; if that fails, too, the request is refused."""
FOUND_OUT = 1.5
"""Step timeouts after which a hang has been detected."""
RETRY = 0.1
"""Seconds until a refused client sends its next request."""
LINGERS = 3.0
"""Seconds for which a request may still have its place in the server after its client has left."""
WORKER_MODULE = "ullm.worker.main"
"""Module in the command line of a worker process."""
PART_MODULE = "ullm.cli.launched"
"""Module in the command line of a part that a launcher has started; the part's name comes last."""
ENGINE, FRONT_END = "engine", "front-end"
"""How the names of parts begin."""
AWAY = 503
"""Status in place of an answer of an engine that was killed."""
ABORTING = "put to sleep with mode=abort"
"""Reason for which requests may end early."""
NOTHING = ""
"""Detail of a fault that had nothing to act on, and was not injected."""


@dataclass
class InjectedFault:
    """A fault that was injected.

    Args:
        at: seconds of trio's clock.
        detail: what exactly was done.
        burst: how many were injected in the same moment, this one included.
    """

    number: int
    kind: str
    at: float
    detail: str = ""
    burst: int = 1


class FaultKind(Protocol):
    """A kind of fault.

    Attributes:
        crashes: True if it may end workers.
        weight: how often it is drawn, relative to others.
    """

    @property
    def name(self) -> str: ...

    @property
    def crashes(self) -> bool: ...

    @property
    def weight(self) -> float: ...

    async def offered(self, world: World) -> bool:
        """Return True if the fault can be injected into this server."""

    async def inject(self, world: World, source: random.Random) -> str:
        """Inject the fault, or start it in ``world.nursery``; return what was done.

        Args:
            source: the fault's own generator, for what remains to be decided.
        """


@dataclass
class World:
    """A server under test and its clients.

    Its many fields are the state of one run, which every kind of fault may read and change.

    Args:
        admin: the admin listener; its prefix is empty.
        seed: of the run.
        nursery: runs what faults do in the background.
        room: number of choices that the server admits at once.
        begun: moments whose faults were injected, or found nothing to act on.
        skipped: faults that were drawn and not injected, and why.
        kinds: more kinds of faults than there usually are, by name.
        armed: number of each fault armed in the server → its plan.
        fired: what the server says has fired, once it has been asked at the end.
        aborting: number of operations under way that may end requests early.
        hanging: number of workers that are known to hang.
        killed: kind of part → how many of it faults have killed.
        engine_away: True from the kill of an engine until the next one answers.
        away_until: when the last engine that was killed had a successor, and front ends had found it.
        links: sockets that a launcher's engine has for its front ends while all of them are connected.
        broken: ports of clients whose front end was killed → when.
    """

    server: MeasuredServer
    endpoint: Endpoint
    admin: Endpoint
    requests: list[ChaosRequest]
    seed: int
    nursery: trio.Nursery
    model: str
    step_timeout: float
    stall_timeout: float
    room: int
    expected: dict[int, AnswerOutcome] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    answers: list[ChaosAnswer] = field(default_factory=list)
    faults: list[InjectedFault] = field(default_factory=list)
    begun: list[Moment] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    kinds: dict[str, FaultKind] = field(default_factory=dict)
    armed: dict[int, str] = field(default_factory=dict)
    fired: list[FiredFault] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=trio.current_time)
    aborting: int = 0
    hanging: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    engine_away: bool = False
    away_until: float = 0.0
    links: int = 0
    broken: dict[int, float] = field(default_factory=dict)
    stopping: trio.Event = field(default_factory=trio.Event)
    _gone: deque[tuple[float, int]] = field(default_factory=deque)

    # --- requests ---------------------------------------------------------------------------------

    async def send(self, request: ChaosRequest, **manner: Any) -> ChaosAnswer:
        """Send one request and return its answer; it counts as in flight meanwhile."""
        answer = ChaosAnswer(request, trio.current_time(), excused=ABORTING if self.aborting else "")
        key = len(self.answers)
        self.answers.append(answer)
        self.live.add(key)
        self._note_load(answer)
        try:
            await send_request(self.endpoint, answer, **manner)
        finally:
            self.live.discard(key)
            if answer.status != 429:  # the server may not have noticed the end yet
                self._gone.append((trio.current_time(), answer.request.choices))
        return answer

    def _note_load(self, newest: ChaosAnswer) -> None:
        """Note how many choices are in flight; each answer remembers the most that there were."""
        while self._gone and self._gone[0][0] < trio.current_time() - LINGERS:
            self._gone.popleft()
        live = [self.answers[key] for key in self.live]
        load = sum(answer.request.choices for answer in live) + sum(choices for _, choices in self._gone)
        for answer in live:
            answer.busiest = max(answer.busiest, load)

    async def client(self, number: int) -> None:
        """Send requests and compare answers until `stopping`; a refused request is asked again."""
        source = random.Random(f"client {number} of seed {self.seed}")
        while not self.stopping.is_set():
            answer = await self.send(source.choice(self.requests))
            self.judge(answer)
            if answer.error is not None:
                await trio.sleep(RETRY)

    def judge(self, answer: ChaosAnswer) -> None:
        """Compare an answer with the one without faults; record violations."""
        if answer.broke and self.broken.get(answer.port or 0, 0.0) >= answer.started:
            self.counts["broken"] += 1  # its front end was killed
            return
        if answer.status == AWAY and answer.retry_after and self._may_be_away(answer):
            self.counts["refused"] += 1  # by a front end that has not seen an engine yet
            return
        self.counts["refused" if answer.status == 429 else "failed" if answer.error else "answered"] += 1
        begin = self.faults[0].at if self.faults else answer.started
        when = f"{answer.started - begin:.1f}–{(answer.ended or begin) - begin:.1f} s"
        seen = f"{when}, {answer.crashes} crashes seen"
        violations = answer.violations(self.expected.get(answer.request.number))
        if answer.status == 429 and answer.busiest <= self.room:
            violations.append(
                f"request {answer.request.number} was refused without cause: at most {answer.busiest} "
                f"choices were in flight, and there is room for {self.room}: {answer.error}"
            )
        self.violations += [f"{violation} ({seen})" for violation in violations]

    def _may_be_away(self, answer: ChaosAnswer) -> bool:
        return self.engine_away or answer.started <= self.away_until

    def note_crash(self, since: float = 0.0) -> None:
        """Count a loss of workers against all requests in flight that started at ``since`` or later."""
        for key in self.live:
            self.answers[key].crashes += self.answers[key].started >= since

    async def note_hang(self) -> None:
        """Count a hang: requests that arrive before it is detected are lost with the worker, too."""
        began = trio.current_time()
        self.note_crash()
        self.hanging += 1
        await trio.sleep(FOUND_OUT * self.step_timeout)
        self.note_crash(since=began)
        self.hanging -= 1

    @property
    def seconds(self) -> float:
        """Seconds since the server was ready."""
        return trio.current_time() - self.began

    @property
    def most_crashes(self) -> int:
        """The largest number of losses that a request in flight has seen."""
        return max((self.answers[key].crashes for key in self.live), default=0)

    @contextmanager
    def may_abort(self) -> Iterator[None]:
        """Allow requests in flight, and those that arrive meanwhile, to end early."""
        self.aborting += 1
        for key in self.live:
            self.answers[key].excused = ABORTING
        try:
            yield
        finally:
            self.aborting -= 1

    # --- processes ----------------------------------------------------------------------------------

    async def workers(self, *, serving: bool = False) -> list[Any]:
        """Return the worker processes in service; during a restart, all worker processes.

        Args:
            serving: return no worker of a replica that starts, sleeps or wakes, and none in a restart.
        """
        status, health = await self.call(self.admin, "GET", "/health")
        workers = [process for process in descendants(self.server.pid) if _is_worker(process)]
        if status != 200:
            return [] if serving else workers
        replicas = [each for each in health["replicas"] if not serving or each["state"] == "up"]
        busy = {pid for replica in replicas for pid in replica["worker_pids"]}
        return [process for process in workers if process.pid in busy]

    async def standbys(self) -> list[Any]:
        """Return the standby worker processes; none during a restart, when they cannot be told apart."""
        busy = {process.pid for process in await self.workers()}
        return [p for p in descendants(self.server.pid) if p.pid not in busy and _is_worker(p)]

    def parts(self, kind: str = "") -> dict[str, Any]:
        """Return the processes of a launcher by name; none for a server that is one process."""
        found = {}
        for process in descendants(self.server.pid):
            line = command_of(process)
            if PART_MODULE in line and line[-1].startswith(kind):
                found[line[-1]] = process
        return found

    # --- calls --------------------------------------------------------------------------------------

    async def administer(self, method: str, path: str, body: Any = None, seconds: float = 30.0) -> Any:
        """Call the admin listener; return the status and the answer or the message of its refusal."""
        killed = self.killed[ENGINE]
        with trio.move_on_after(seconds):
            status, answer = await self.call(self.admin, method, path, body)
            was_away = self.engine_away or killed != self.killed[ENGINE]
            return AWAY if status == 0 and was_away else status, answer
        self.violations.append(f"{method} {path} is not answered within {seconds:g} s")
        return (0, "no answer")

    async def call(self, endpoint: Endpoint, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send one request; return its status, 0 without an answer, and the JSON or the error message."""
        connection = Connection(endpoint)
        try:
            return 200, await connection.json(method, path, body)
        except ServerRefused as refusal:
            return refusal.status, str(refusal)
        except ServerUnreachable as error:
            return 0, str(error)
        finally:
            await connection.aclose()


def _is_worker(process: Any) -> bool:
    return WORKER_MODULE in command_of(process)


def command_of(process: Any) -> list[str]:
    """Return the command line of one of psutil's processes; empty once it is gone."""
    try:
        command: list[str] = process.cmdline()
        return command
    except psutil_module().Error:
        return []
