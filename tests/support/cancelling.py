"""Cancel a piece of work at each of its scheduler steps, one run per step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from tests.support.seeded import seeded

MAX_STEPS = 10_000
"""More than any work here takes: it would not end."""


class Steps(trio.abc.Instrument):
    """Calls a function before the given step of any task, counted from when it is added.

    Attributes:
        reached: whether there was that step.
    """

    def __init__(self, step: int, function: Callable[[], object]) -> None:
        self._left = step
        self._function = function
        self.reached = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self.reached = True
            self._function()


async def cancelled_at(step: int, work: Callable[[], Awaitable[object]]) -> bool:
    """Run ``work``, and cancel the scope around it before the given step; return whether it came to that.

    Raises:
        BaseException: whatever comes out of the scope; a cancellation does not.
    """
    ended = False
    with trio.CancelScope() as scope:
        steps = Steps(step, scope.cancel)
        trio.lowlevel.add_instrument(steps)
        try:
            await work()
            ended = True
        finally:
            trio.lowlevel.remove_instrument(steps)
    assert ended or scope.cancelled_caught
    return steps.reached


def cancel_at_each_step(
    work: Callable[[], Awaitable[object]],
    make_clock: Callable[[], trio.abc.Clock],
    *,
    seed: int = 0,
    first: int = 1,
    every: int = 1,
) -> int:
    """Cancel ``work`` at its first step, its second, and so on, until it ends before; return how many.

    Each time in a loop of its own, so that nothing of one run is left for the next, and with the same choices
    of trio up to the cancellation, so that no step is left out.

    Args:
        first, every: for a sample: cancel at steps ``first``, ``first + every``, …
    """
    for step in range(first, MAX_STEPS, every):
        try:
            with seeded(seed):
                reached = trio.run(cancelled_at, step, work, clock=make_clock())
        except BaseException as error:
            error.add_note(f"cancelled at step {step}, seed {seed}")
            raise
        if not reached:
            return step - 1
    raise AssertionError(f"the work takes more than {MAX_STEPS} steps")
