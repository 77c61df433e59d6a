"""The faults of one test, in all engines and servers that it has, and at points of its own program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from msgspec.structs import replace

from ullm.errors import ConfigError
from ullm.faults import ArmedFault, FaultInjector, FaultPlan, FaultReport, FiredFault

AT_THE_END = "worker.stop"
"""The point that a server hits when nobody can ask it any more."""


class Injector(Protocol):
    """A `ullm.faults.FaultInjector`, here or in a server."""

    def arm(self, plan: str) -> object:
        """Add a plan."""

    def clear(self) -> object:
        """Disarm everything."""

    def describe(self) -> FaultReport:
        """Return what is armed, and what has fired."""


class FaultControl:
    """Faults of one test, armed in all its engines and servers; see the fixture ``ullm_faults``.

    Args:
        own: the injector of points that are the test's own program's, see `ullm.faults.point`.

    Attributes:
        strict: the plugin fails a test that would pass, if a fault that was armed has not fired.
    """

    def __init__(self, own: FaultInjector | None = None) -> None:
        self.strict = True
        self._own = own or FaultInjector(own=True)
        self._plan = self._asked = FaultPlan()
        self._injectors: list[Injector] = []
        self._ended: list[FaultReport] = []

    @property
    def history(self) -> list[FiredFault]:
        """Faults that have fired, in all of them; for servers that have ended, those last known."""
        return [fired for report in self._reports() for fired in report.fired]

    def arm(self, plan: str) -> None:
        """Add a plan. Engines that are open count hits from now on, later ones from their start.

        Raises:
            ConfigError: it cannot be read.
        """
        parsed = FaultPlan.parse(plan)
        own, others = (
            replace(parsed, faults=tuple(f for f in parsed.faults if f.is_own is wanted))
            for wanted in (True, False)
        )
        self._asked += parsed
        self._own.arm(own)
        if others.faults:
            self._plan += others
            for injector in self._injectors:
                injector.arm(str(others))

    def clear(self) -> None:
        """Disarm all faults; those that have not fired are not expected to any more."""
        self._plan = FaultPlan()
        for injector in (self._own, *self._injectors):
            fired = [fault for fault in injector.describe().armed if fault.fired]
            self._ended.append(FaultReport(fired, []))
            injector.clear()

    def assert_all_fired(self) -> None:
        """Demand that every fault that was armed, wherever, has fired at least once somewhere.

        Those of `AT_THE_END` may still come.

        Raises:
            AssertionError: names those that have not, and how often their points were hit.
        """
        reports = self._reports()
        armed: dict[str, list[ArmedFault]] = {}
        for report in reports:
            for fault in report.armed:
                armed.setdefault(fault.fault, []).append(fault)
        if not armed and self._plan.faults:  # no engine and no server has ever been there
            raise AssertionError(f"{self._plan} was armed, and nothing was there that it could happen to")
        missing = [
            f"{text} ({sum(each.hits for each in faults)} hits)"
            for text, faults in armed.items()
            if not any(each.fired for each in faults) and not text.startswith(AT_THE_END)
        ]
        if missing:
            raise AssertionError(
                f"armed and never fired: {'; '.join(missing)}; if that is meant: ullm_faults.strict = False"
            )

    def plan_with(self, other: str) -> str:
        """Return the test's plan and another one, for an engine or server that is being opened."""
        return str(FaultPlan.parse(other) + self._plan)

    @contextmanager
    def also_in(self, injector: Injector) -> Iterator[None]:
        """Arm further plans there too, within this block. One that has joined already stays as it is."""
        if injector in self._injectors:
            yield
            return
        self._injectors.append(injector)
        try:
            yield
        finally:
            self.leave(injector)

    def join(self, injector: Injector) -> None:
        """Arm all plans there too, those so far as well, until `leave`."""
        if injector not in self._injectors:
            self._injectors.append(injector)
        if self._plan.faults:
            injector.arm(str(self._plan))

    def has(self, injector: Injector) -> bool:
        """Return whether it has joined."""
        return injector in self._injectors

    def leave(self, injector: Injector) -> None:
        """Arm nothing there any more; what has happened there stays known. Does nothing if it has left."""
        if injector in self._injectors:
            self._injectors.remove(injector)
            with suppress(OSError):  # a server that hangs tells nothing more
                self._ended.append(injector.describe())

    def report(self) -> str:
        """Return what was injected, line by line, for a test that has failed; empty if nothing was armed."""
        reports = self._reports()
        armed = [fault for report in reports for fault in report.armed]
        fired = [(each, report) for report in reports for each in report.fired]
        lines = [f"plan   {self._asked}"] if self._asked.faults else []
        lines += [f"armed  #{f.number} {f.fault}: {f.hits} hits, fired {f.fired} times" for f in armed]
        lines += [f"fired  {each}" for each, _ in fired]
        again = [text for each, report in fired if (text := _again(each, report))]
        if again:
            lines.append(f"again  ULLM_FAULTS='{'; '.join(dict.fromkeys(again))}'")
        return "\n".join(lines)

    def _reports(self) -> list[FaultReport]:
        reports = list(self._ended)
        for injector in (self._own, *self._injectors):
            with suppress(OSError):
                reports.append(injector.describe())
        return reports


def _again(fired: FiredFault, report: FaultReport) -> str:
    """Return the fault that happens at this hit, whatever the seed was."""
    armed = next((fault for fault in report.armed if fault.number == fired.number), None)
    try:
        (fault,) = FaultPlan.parse(armed.fault).faults if armed else ()
    except (ConfigError, ValueError):  # cleared since
        return ""
    return str(replace(fault, nth=fired.hit, times=None, probability=1.0, seed=None))
