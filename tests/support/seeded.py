"""One seed, one run: trio's choices among tasks that can run, and the order in which threads finish.

Trio shuffles what can run at the same time, so that nobody relies on an order. Here a seed says how; it is
the run's only source of chance, and the same seed gives the same run, step for step. What is private in trio
for that is in this module, and `tests/testing/test_seeded.py` fails when a release moves it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import trio
from trio.testing import MockClock

T = TypeVar("T")


class Trace(trio.abc.Instrument):
    """Every step of a run, in order: its virtual time, and the task's name."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Note a step."""
        self._lines.append(f"{trio.current_time():.6f} {task.name}")

    def __bytes__(self) -> bytes:
        return "\n".join(self._lines).encode()

    def __len__(self) -> int:
        return len(self._lines)


async def _at_once(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Stand in for `trio.to_thread.run_sync`: real threads finish in an order that no seed decides."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have `trio.run` make its choices by a seed, within this block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        patch.setattr(trio.to_thread, "run_sync", _at_once)
        state = trio._core._run._r.getstate()
        trio._core._run._r.seed(seed)
        try:
            yield
        finally:
            trio._core._run._r.setstate(state)


def run_seeded(
    seed: int,
    function: Callable[..., Awaitable[T]],
    *arguments: Any,
    instruments: Sequence[trio.abc.Instrument] = (),
) -> T:
    """Call `trio.run` on a virtual clock, in the one run that belongs to the seed."""
    with seeded(seed):
        clock = MockClock(autojump_threshold=0.0)
        return trio.run(function, *arguments, clock=clock, instruments=instruments)
