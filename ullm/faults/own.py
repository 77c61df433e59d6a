"""Points of other programs: ullm's plans, filters, seeds and history for services that are no language model.

A program names its points, and a test, or whoever starts the program, has faults happen there::

    async def write(entry):
        await point("ledger.write", request=entry.id)

    with injected("ledger.write:raise@nth=3; seed=7") as faults:
        ...
    assert [fired.hit for fired in faults.history] == [3]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ullm.faults.injector import FaultInjector
from ullm.faults.plan import FaultPlan


class _Active:
    """Injectors in the order in which their blocks were entered.

    Of the whole process, and not of a context, so that every task and thread of a program meets them, whoever
    has started it and when.
    """

    def __init__(self) -> None:
        self.injectors: tuple[FaultInjector, ...] = ()


_active = _Active()


async def point(name: str, *, request: str = "", token: int | None = None) -> None:
    """Let a fault happen here, in a task of trio; return at once, without a checkpoint, if none does.

    Args:
        name: with a dot, and not beginning as those of ullm do: ``ledger.write``.
        request: id of whatever is being worked on, for faults that are tied to one.
        token: which part of it, counted from 1.

    Raises:
        FaultInjected: by the action ``raise``.
        OSError: by ``disk_full``: there is no space left on the device.
    """
    for injector in _active.injectors:
        await injector.at(name, request=request, token=token)


def point_now(name: str, *, request: str = "", token: int | None = None) -> None:
    """Let a fault happen in synchronous code: like `point`, but what takes time blocks the thread.

    Raises:
        FaultInjected, OSError: as `point`.
    """
    for injector in _active.injectors:
        injector.hit(name, request=request, token=token)


@contextmanager
def injected(plan: FaultPlan | str) -> Iterator[FaultInjector]:
    """Have faults happen at the points of this process within a block.

    Yields:
        The injector: `arm`, `clear`, `describe`, and the history of what has fired.

    Raises:
        ConfigError: the plan cannot be read, or names points of ullm, which have their own ways in.
    """
    injector = FaultInjector(own=True)
    injector.arm(plan)
    _active.injectors += (injector,)
    try:
        yield injector
    finally:
        _active.injectors = tuple(each for each in _active.injectors if each is not injector)
