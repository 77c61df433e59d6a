"""The disturbances: what keeps a server from having the whole machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from tests.benchmarks.compare.candidates import ServerCandidate
from tests.benchmarks.disturbance.control_group import (
    QuotaUnavailable,
    enter,
    find_controller,
    quota_group,
)
from ullm.errors import UsageError
from ullm.machine import usable_cores

UNDISTURBED = "undisturbed"
SLOWER = 4
"""How many times as long a disturbed server may take to start."""


@dataclass(frozen=True)
class Disturbance:
    """One disturbance.

    Args:
        neighbours: number of busy processes beside the server, from when it is ready.
        one_core: whether the server is bound to one core.
        threads: threads per core that the server is told to compute with; 0: as many as it chooses.
        quota: processors that the server may use on average; 0: no quota.
        options: more options of ullm serve; only ullm is measured with them.
        at_once: whether the load begins when the server is ready, whatever else it still does.
        beside: name of the disturbance that is measured without this one.
    """

    name: str
    neighbours: int = 0
    one_core: bool = False
    threads: int = 0
    quota: float = 0.0
    options: tuple[str, ...] = ()
    at_once: bool = False
    beside: str = UNDISTURBED

    def applies_to(self, candidate: ServerCandidate) -> bool:
        """Return whether a server can be disturbed like this."""
        return not (self.options and candidate.is_peer) and not (self.threads and not candidate.threads)

    def fair_share(self, cores: int) -> float:
        """Return the processors that a fair kernel gives the server at least, if it wants as many as it can.

        A neighbour takes at most one. Where Linux schedules sessions as groups, each neighbour is given as
        much as the whole server, otherwise as much as one of its threads, which leaves the server more.
        """
        left = max(cores - self.neighbours, cores / (1 + self.neighbours))
        return min(left, 1.0 if self.one_core else left, self.quota or left)

    def missing(self) -> str:
        """Return why this machine cannot do it; empty if it can."""
        if self.one_core and shutil.which("taskset") is None:
            return "there is no taskset"
        try:
            if self.quota:
                find_controller().create(f"ullm-trial-{os.getpid()}", self.quota).rmdir()
        except QuotaUnavailable as error:
            return str(error)
        return ""

    @asynccontextmanager
    async def around(self, candidate: ServerCandidate) -> AsyncIterator[ServerCandidate]:
        """Yield the candidate with the command that starts it disturbed; neighbours come later."""
        before: tuple[str, ...] = ()
        after = self.options
        if self.one_core:
            before = ("taskset", "--cpu-list", str(first_core()))
        if self.threads:
            after += (candidate.threads, str(self.threads * usable_cores()))
        candidate = replace(candidate, start_seconds=SLOWER * candidate.start_seconds)
        if not self.quota:
            yield _wrap(before, candidate, after)
            return
        async with quota_group(find_controller(), self.quota) as folder:
            yield _wrap((*enter(folder), *before), candidate, after)


NONE = Disturbance(UNDISTURBED)
NO_STANDBY = Disturbance("no standby worker", options=("--standby-workers", "0"))
STANDBY = Disturbance("a prepared standby worker", options=("--standby-workers", "1"), beside=NO_STANDBY.name)
PREPARING = replace(STANDBY, name="a standby worker being prepared", at_once=True)
DISTURBANCES = (
    NONE,
    *(Disturbance(f"{n} neighbour{'s' if n > 1 else ''}", neighbours=n) for n in (1, 2, 4)),
    Disturbance("one core", one_core=True),
    *(Disturbance(f"{n} threads per core", threads=n) for n in (2, 4)),
    *(Disturbance(f"quota {cores}", quota=cores) for cores in (1.5, 0.5)),
    NO_STANDBY,
    STANDBY,
    PREPARING,
)


def _wrap(before: tuple[str, ...], candidate: ServerCandidate, after: tuple[str, ...]) -> ServerCandidate:
    return replace(candidate, arguments=(*before, *candidate.arguments, *after))


def first_core() -> int:
    """Return the number of the first core that this process may use."""
    if sys.platform != "linux":
        raise UsageError("only Linux has taskset")
    return min(os.sched_getaffinity(0))
