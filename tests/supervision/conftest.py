"""Scripted children: each does what the test tells it to, and a log says what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ullm.supervision import IGNORE, ChildReport, ChildSpec, Shutdown, cleanup_scope


class Boom(Exception):
    """What scripted children raise."""


class _Life:
    def __init__(self) -> None:
        self.told = trio.Event()
        self.error: BaseException | None = None


class Cast:
    """The children of one test.

    ``log`` has "start a" and "stop a" in the order of events; ``lives["a"]`` counts how often a was
    started, which is also the value that it passes to ``task_status.started``.
    """

    Boom = Boom

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lives: Counter[str] = Counter()
        self._openings: dict[str, list[str]] = {}
        self._always: dict[str, str] = {}
        self._now: dict[str, _Life] = {}

    def spec(self, child_id: str, **options: Any) -> ChildSpec:
        """A child that runs until told otherwise."""
        return ChildSpec(child_id, partial(self._play, child_id), **options)

    def stubborn(self, child_id: str, release: trio.Event, **options: Any) -> ChildSpec:
        """A child that ignores cancellation until ``release``."""

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with trio.CancelScope(shield=True):
                task_status.started()
                await release.wait()

        return ChildSpec(child_id, run, **options)

    def tidy(self, child_id: str, seconds: float, **options: Any) -> ChildSpec:
        """A child whose cleanup takes a while; logs "cut short a" if it did not get to its end."""

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                with cleanup_scope() as scope:
                    await trio.sleep(seconds)
                self.log.append(f"cut short {child_id}" if scope.cancelled_caught else f"stop {child_id}")

        return ChildSpec(child_id, run, **options)

    def opening(self, child_id: str, *what: str, always: str = "ready") -> None:
        """The next starts are "ready", "slow" (1 s), "fail", "hang" or "ignore"; after them, ``always``."""
        self._openings[child_id] = list(what)
        self._always[child_id] = always

    @staticmethod
    def outcomes(reports: Iterable[ChildReport]) -> list[tuple[str, str]]:
        """Who ended how, in the order in which they were stopped."""
        return [(report.child_id, report.outcome) for report in reports]

    async def end(self, child_id: str) -> None:
        """It returns."""
        await self._tell(child_id, None)

    async def shutdown(self, child_id: str) -> None:
        """It ends on purpose."""
        await self._tell(child_id, Shutdown("as planned"))

    async def crash(self, child_id: str, message: str = "boom") -> None:
        """It raises."""
        await self._tell(child_id, Boom(message))

    def tell(self, child_id: str, error: BaseException | None) -> None:
        """It ends when it next runs."""
        life = self._now[child_id]
        life.error = error
        life.told.set()

    def clear(self) -> None:
        """Begin a new log."""
        self.log.clear()

    async def _tell(self, child_id: str, error: BaseException | None) -> None:
        self.tell(child_id, error)
        await wait_all_tasks_blocked()

    async def _play(self, child_id: str, *, task_status: trio.TaskStatus[Any]) -> None:
        script = self._openings.get(child_id, [])
        opening = script.pop(0) if script else self._always.get(child_id, "ready")
        self.lives[child_id] += 1
        self.log.append(f"start {child_id}")
        if opening == "fail":
            raise Boom(f"{child_id} cannot start")
        if opening == "hang":
            await trio.sleep_forever()
        if opening == "slow":
            await trio.sleep(1)
        if opening == "ignore":
            task_status.started(IGNORE)
            return
        life = self._now[child_id] = _Life()
        task_status.started(self.lives[child_id])
        try:
            await life.told.wait()
        finally:
            self.log.append(f"stop {child_id}")
        if life.error is not None:
            raise life.error


@pytest.fixture
def cast() -> Cast:
    """Scripted children."""
    return Cast()
