"""The faults of one test, in all engines and servers that it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from ullm.faults import FaultPlan, FaultReport, FiredFault


class Injector(Protocol):
    """A `ullm.faults.FaultInjector`, here or in a server."""

    def arm(self, plan: str) -> object:
        """Add a plan."""

    def clear(self) -> object:
        """Disarm everything."""

    def describe(self) -> FaultReport:
        """Return what is armed, and what has fired."""


class FaultControl:
    """Faults of one test, armed in all its engines and servers; see the fixture ``ullm_faults``."""

    def __init__(self) -> None:
        self._plan = FaultPlan()
        self._injectors: list[Injector] = []
        self._fired: list[FiredFault] = []

    @property
    def history(self) -> list[FiredFault]:
        """Faults that have fired, in all of them; for servers that have ended, those last known."""
        return self._fired + [fired for injector in self._injectors for fired in injector.describe().fired]

    def arm(self, plan: str) -> None:
        """Add a plan. Engines that are open count hits from now on, later ones from their start.

        Raises:
            ConfigError: it cannot be read.
        """
        self._plan += FaultPlan.parse(plan)
        for injector in self._injectors:
            injector.arm(plan)

    def clear(self) -> None:
        """Disarm all faults."""
        self._plan = FaultPlan()
        for injector in self._injectors:
            injector.clear()

    def plan_with(self, other: str) -> str:
        """Return the test's plan and another one, for an engine or server that is being opened."""
        return str(FaultPlan.parse(other) + self._plan)

    @contextmanager
    def also_in(self, injector: Injector) -> Iterator[None]:
        """Arm further plans there too, within this block."""
        self._injectors.append(injector)
        try:
            yield
        finally:
            self._injectors.remove(injector)
            with suppress(OSError):  # a server that hangs tells nothing more
                self._fired += injector.describe().fired
