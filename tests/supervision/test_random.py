"""Random lives of a tree: whatever happens, it stops in time, in order, and leaves nothing behind."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import ChildSpec, ChildStatus, Restart, Strategy, Supervisor, open_supervisor
from ullm.supervision.errors import ActorLost, ChildConflict, ChildNotFound, RestartLimitReached, StartFailed
from ullm.supervision.shutdown import KILL_GRACE, SETTLE

EXPECTED = (ActorLost, ChildConflict, ChildNotFound, StartFailed)


class Chaos:
    """Children that fail to start, hang, crash, end, and clean up slowly, as the dice will have it."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.started: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.alive: list[str] = []
        self.wild = False
        """Until then, children start without trouble."""

    def spec(self, number: int) -> ChildSpec:
        restart = self.dice.choice(list(Restart))
        return ChildSpec(
            f"c{number}", self._runner(f"c{number}"), restart, self.dice.choice([0.0, 1.0, 30.0])
        )

    def _runner(self, name: str) -> Any:
        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            self.started[name] += 1
            self.alive.append(name)
            try:
                await trio.sleep(self.dice.choice([0, 0, 0, 0.5, 3]) if self.wild else 0)
                if self.wild and self.dice.random() < 0.2:
                    raise OSError("cannot start")
                task_status.started()
                await trio.sleep(self.dice.choice([0.01, 0.1, 1, 1000]))
                if self.dice.random() < 0.5:
                    raise OSError("crash")
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(self.dice.choice([0, 0, 0.01, 2]) if self.dice.random() < 0.3 else 0)
                self.alive.remove(name)
                self.ended[name] += 1

        return run

    async def meddle(self, supervisor: Supervisor) -> None:
        """Some task keeps changing the tree."""
        for number in range(100):
            await trio.sleep(self.dice.choice([0, 0, 0.1, 0.3]))
            name = f"c{self.dice.randrange(8)}"
            call = self.dice.choice(
                [supervisor.terminate_child, supervisor.restart_child, supervisor.delete_child, None]
            )
            try:
                with trio.move_on_after(self.dice.choice([0.05, 1.0, 60.0])):
                    await (call(name) if call is not None else supervisor.start_child(self.spec(number % 8)))
            except EXPECTED:
                continue
            self.check(supervisor)

    def check(self, supervisor: Supervisor) -> None:
        """What is true at any time between two events."""
        counts = supervisor.count_children()
        children = supervisor.which_children()
        assert counts.specs == len(children)
        assert counts.restarting == sum(child.status is ChildStatus.RESTARTING for child in children)
        assert counts.active + counts.restarting <= counts.specs


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("seed", range(50))
async def test_random_life(seed: int, strategy: Strategy, autojump_clock: MockClock) -> None:
    chaos = Chaos(seed)
    delay = chaos.dice.choice([None, lambda n: 0.2 * n])
    stop_after = chaos.dice.choice([0.0, 1.0, 5.0, 20.0])
    budget = chaos.dice.choice([0.0, 1.0, 10.0])
    ended_at: list[float] = []
    options: Any = {"strategy": strategy, "intensity": 50, "period": 10.0, "restart_delay": delay}

    async def live() -> None:
        async with open_supervisor("root", [chaos.spec(n) for n in range(5)], **options) as supervisor:
            chaos.wild = True
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(chaos.meddle, supervisor)
                await trio.sleep(stop_after)
                began = trio.current_time()
                await supervisor.stop(began + budget)
                ended_at.append(trio.current_time() - began)
                nursery.cancel_scope.cancel()

    try:
        await live()
    except* RestartLimitReached:
        assert not ended_at
    else:
        assert ended_at[0] <= budget + 2 * (SETTLE + KILL_GRACE) + 1e-6
    await trio.sleep(5)  # children that were abandoned in their cleanup come to its end
    await wait_all_tasks_blocked()
    assert chaos.alive == []
    assert chaos.started == chaos.ended
