"""What faults act on: the server's processes and endpoints, and the requests in flight."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from ullm.chaos.catalogue import ChaosRequest
from ullm.chaos.chaos_client import AnswerOutcome, ChaosAnswer, send_request
from ullm.client.http import Connection, Endpoint
from ullm.errors import ServerRefused, ServerUnreachable
from ullm.testing.processes import MeasuredServer, at_root, descendants, psutil_module

MAX_CRASHES = 2
"""Losses of workers after which a request runs alone; if that fails, too, the request is refused."""
FOUND_OUT = 1.5
"""Step timeouts after which a hang has been detected."""
RETRY = 0.1
"""Seconds until a refused client sends its next request."""
WORKER_MODULE = "ullm.worker.main"
"""Module in the command line of a worker process."""
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
    """

    number: int
    kind: str
    at: float
    detail: str = ""


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

    async def inject(self, world: World) -> str:
        """Inject the fault, or start it in ``world.nursery``; return what was done."""


@dataclass
class World:
    """A server under test and its clients.

    Its many fields are the state of one run, which every kind of fault may read and change.

    Args:
        admin: the admin listener; its prefix is empty.
        source: source of all random draws about faults.
        nursery: runs what faults do in the background.
        room: number of requests that the server admits at once.
        aborting: number of operations under way that may end requests early.
        hanging: number of workers that are known to hang.
    """

    server: MeasuredServer
    endpoint: Endpoint
    admin: Endpoint
    requests: list[ChaosRequest]
    source: random.Random
    nursery: trio.Nursery
    model: str
    step_timeout: float
    stall_timeout: float
    room: int
    expected: dict[int, AnswerOutcome] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    answers: list[ChaosAnswer] = field(default_factory=list)
    faults: list[InjectedFault] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    aborting: int = 0
    hanging: int = 0
    stopping: trio.Event = field(default_factory=trio.Event)

    # --- requests ---------------------------------------------------------------------------------

    async def send(self, request: ChaosRequest, **manner: Any) -> ChaosAnswer:
        """Send one request and return its answer; it counts as in flight meanwhile."""
        answer = ChaosAnswer(request, trio.current_time(), excused=ABORTING if self.aborting else "")
        key = len(self.answers)
        self.answers.append(answer)
        self.live.add(key)
        try:
            await send_request(self.endpoint, answer, **manner)
        finally:
            self.live.discard(key)
        return answer

    async def client(self, number: int) -> None:
        """Send requests and compare answers until `stopping`; a refused request is asked again."""
        source = random.Random(f"client {number} {len(self.requests)}")
        while not self.stopping.is_set():
            answer = await self.send(source.choice(self.requests))
            self.judge(answer)
            if answer.error is not None:
                await trio.sleep(RETRY)

    def judge(self, answer: ChaosAnswer) -> None:
        """Compare an answer with the one without faults; record violations."""
        self.counts["refused" if answer.status == 429 else "failed" if answer.error else "answered"] += 1
        begin = self.faults[0].at if self.faults else answer.started
        when = f"{answer.started - begin:.1f}–{(answer.ended or begin) - begin:.1f} s"
        seen = f"{when}, {answer.crashes} crashes seen"
        violations = answer.violations(self.expected.get(answer.request.number))
        self.violations += [f"{violation} ({seen})" for violation in violations]

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
        status, health = await self.call(at_root(self.endpoint), "GET", "/health")
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

    # --- calls --------------------------------------------------------------------------------------

    async def administer(self, method: str, path: str, body: Any = None, seconds: float = 30.0) -> Any:
        """Call the admin listener; return the status and the answer or the message of its refusal."""
        with trio.move_on_after(seconds):
            return await self.call(self.admin, method, path, body)
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
    try:
        return WORKER_MODULE in process.cmdline()
    except psutil_module().Error:
        return False
