"""What faults act on: the server's processes and endpoints, and the requests that are in flight."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from ullm.chaos.catalogue import ChaosRequest
from ullm.chaos.chaos_client import AnswerOutcome, ChaosAnswer, ask_server
from ullm.client.http import Connection, Endpoint
from ullm.errors import ServerRefused, ServerUnreachable
from ullm.testing.processes import ServerProcess, at_root, descendants, psutil_module

MAX_CRASHES = 2
"""A request that was being computed at so many losses of workers runs alone, and one more convicts it."""
FOUND_OUT = 1.5
"""Step timeouts after which a hang has been found out."""
RETRY = 0.1
"""Seconds before a refused client asks again."""
WORKER_MODULE = "ullm.worker.main"
"""Tells a worker's command line from others'."""
ABORTING = "put to sleep with mode=abort"
"""Why requests may end early."""
NOTHING = ""
"""What a kind says that found nothing to act on: no fault has happened."""


@dataclass
class InjectedFault:
    """One that was injected.

    Args:
        at: seconds of trio's clock.
        detail: what exactly was done, or why there was nothing to do it to.
    """

    number: int
    kind: str
    at: float
    detail: str = ""


class FaultKind(Protocol):
    """A kind of fault.

    Attributes:
        crashes: it may cost the workers.
        weight: how often it is drawn, relative to others.
    """

    @property
    def name(self) -> str: ...

    @property
    def crashes(self) -> bool: ...

    @property
    def weight(self) -> float: ...

    async def offered(self, world: World) -> bool:
        """Whether this server can have it."""

    async def inject(self, world: World) -> str:
        """Do it, or begin it in ``world.nursery``; what was done."""


@dataclass
class World:
    """See the module.

    Args:
        admin: the admin listener; its prefix is empty.
        source: draws everything about faults.
        nursery: of what faults leave running.
        room: requests that the server takes at once.
        aborting: operations under way that may end requests early.
        hanging: workers that stand still, as far as is known.
    """

    server: ServerProcess
    endpoint: Endpoint
    admin: Endpoint
    asks: list[ChaosRequest]
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

    async def ask(self, ask: ChaosRequest, **manner: Any) -> ChaosAnswer:
        """One request to its end, noted as in flight meanwhile."""
        answer = ChaosAnswer(ask, trio.current_time(), excused=ABORTING if self.aborting else "")
        key = len(self.answers)
        self.answers.append(answer)
        self.live.add(key)
        try:
            await ask_server(self.endpoint, answer, **manner)
        finally:
            self.live.discard(key)
        return answer

    async def client(self, number: int) -> None:
        """Send requests and compare answers until `stopping`; a refused request is asked again."""
        source = random.Random(f"client {number} {len(self.asks)}")
        while not self.stopping.is_set():
            answer = await self.ask(source.choice(self.asks))
            self.judge(answer)
            if answer.error is not None:
                await trio.sleep(RETRY)

    def judge(self, answer: ChaosAnswer) -> None:
        """Compare an answer with the undisturbed one's."""
        self.counts["refused" if answer.status == 429 else "failed" if answer.error else "answered"] += 1
        begin = self.faults[0].at if self.faults else answer.started
        when = f"{answer.started - begin:.1f}–{(answer.ended or begin) - begin:.1f} s"
        seen = f"{when}, {answer.crashes} crashes seen"
        found = answer.violations(self.expected.get(answer.ask.number))
        self.violations += [f"{violation} ({seen})" for violation in found]

    def note_crash(self, since: float = 0.0) -> None:
        """Workers are lost, with all that is in flight and has begun at ``since`` or later."""
        for key in self.live:
            self.answers[key].crashes += self.answers[key].started >= since

    async def note_hang(self) -> None:
        """A worker stands still: lost with it is also who comes before that is found out."""
        began = trio.current_time()
        self.note_crash()
        self.hanging += 1
        await trio.sleep(FOUND_OUT * self.step_timeout)
        self.note_crash(since=began)
        self.hanging -= 1

    @property
    def most_crashes(self) -> int:
        """Of the requests in flight."""
        return max((self.answers[key].crashes for key in self.live), default=0)

    @contextmanager
    def may_abort(self) -> Iterator[None]:
        """Those in flight, and those that come meanwhile, may end early."""
        self.aborting += 1
        for key in self.live:
            self.answers[key].excused = ABORTING
        try:
            yield
        finally:
            self.aborting -= 1

    # --- processes ----------------------------------------------------------------------------------

    async def workers(self, *, serving: bool = False) -> list[Any]:
        """The worker processes in service; while none is, as during a restart, all that there are.

        Args:
            serving: none instead of those, and none of a replica that starts, sleeps or wakes.
        """
        status, health = await self.call(at_root(self.endpoint), "GET", "/health")
        found = [process for process in descendants(self.server.pid) if _is_worker(process)]
        if status != 200:
            return [] if serving else found
        replicas = [each for each in health["replicas"] if not serving or each["state"] == "up"]
        busy = {pid for replica in replicas for pid in replica["worker_pids"]}
        return [process for process in found if process.pid in busy]

    async def standbys(self) -> list[Any]:
        """Spare worker processes; none while it cannot be said which they are."""
        busy = {process.pid for process in await self.workers()}
        return [p for p in descendants(self.server.pid) if p.pid not in busy and _is_worker(p)]

    # --- questions ----------------------------------------------------------------------------------

    async def administer(self, method: str, path: str, body: Any = None, seconds: float = 30.0) -> Any:
        """Call the admin listener; return the status and the answer or the message of its refusal."""
        with trio.move_on_after(seconds):
            return await self.call(self.admin, method, path, body)
        self.violations.append(f"{method} {path} is not answered within {seconds:g} s")
        return (0, "no answer")

    async def call(self, endpoint: Endpoint, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One question: the status, 0 if there was no answer, and the JSON, or the words of a refusal."""
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
