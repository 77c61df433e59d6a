"""What a chaos run is asked to do, and the server that it is done to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ullm.chaos import client_faults, operation_faults, part_faults, planned_faults, signal_faults
from ullm.chaos.world import FaultKind
from ullm.errors import UsageError
from ullm.system.interpreter import python_command

SCRIPTED = "scripted"
TINY = "tiny"
STEP_SECONDS = 0.005
"""Duration of a step of the scripted model."""
ROOM = 48
"""Number of choices that the server admits at once, running and waiting."""
BURSTS = 0.25
"""Share of the moments in which several faults are injected at once, by default."""
MAX_GAP = 12.0
"""Seconds of silence that a stream may have, by default: a hang is found after the step timeout, and
a loss on a busy machine takes a few seconds."""


@dataclass(frozen=True)
class ChaosPlan:
    """A run.

    Args:
        model: folder or name, as for ``ullm serve``; ``scripted`` and ``tiny`` are written for the run.
        arguments: more options of ``ullm serve``.
        seconds: time limit for the injection of all faults; missing it is a violation.
        streams: number of clients that send one request after another.
        pause: maximum seconds between two faults, drawn uniformly from 0.
        bursts: share of the moments in which several faults are injected at once.
        only: kinds to inject, by name or by the part of it before the dot; empty: all.
        max_tokens: minimum and maximum per request.
        max_gap: seconds of silence that a stream may have whose client reads.
        min_answered: answers that there must be while faults come; None: one for each client.
    """

    model: str
    arguments: tuple[str, ...] = ()
    seed: int = 0
    faults: int = 100
    seconds: float = 90.0
    streams: int = 8
    pause: float = 0.5
    bursts: float = BURSTS
    only: tuple[str, ...] = ()
    max_tokens: tuple[int, int] = (20, 200)
    step_timeout: float = 2.0
    stall_timeout: float = 2.0
    max_gap: float = MAX_GAP
    min_answered: int | None = None

    @property
    def least_answered(self) -> int:
        """Answers that there must be while faults come."""
        return self.streams if self.min_answered is None else self.min_answered

    def command(self, port: int, admin: Path) -> list[str]:
        """Return the command that starts the server."""
        options = {
            "--port": port,
            "--admin-listen": f"unix:{admin}",
            "--max-bs": ROOM // 3,
            "--max-queue": ROOM - ROOM // 3,
            "--max-restarts": 1_000_000,
            "--step-timeout": self.step_timeout,
            "--stall-timeout": self.stall_timeout,
            "--health-interval": 1,
            "--standby-workers": 1,
            "--sse-keep-alive": 0.5,
        }
        flags = [text for flag, value in options.items() for text in (flag, str(value))]
        # The calibration is a process of its own for a while, as if one were left behind.
        flags.append("--no-cpu-calibration")
        return python_command("-m", "ullm", "serve", "--model", self.model, *flags, *self.arguments)


def all_kinds() -> list[FaultKind]:
    """Return every kind of fault."""
    modules = (signal_faults, client_faults, operation_faults, planned_faults, part_faults)
    return [kind for module in modules for kind in module.KINDS]


def chosen_kinds(only: Sequence[str]) -> list[FaultKind]:
    """Return the kinds that ``only`` names, all if it is empty.

    Raises:
        UsageError: no such kind.
    """
    names = {kind.name for kind in all_kinds()}
    unknown = [name for name in only if name not in names | {each.split(".")[0] for each in names}]
    if unknown:
        raise UsageError(f"--kinds {unknown[0]}: expected some of {', '.join(sorted(names))}")
    return [k for k in all_kinds() if not only or k.name in only or k.name.split(".")[0] in only]


def check(plan: ChaosPlan) -> None:
    """Raise `UsageError` for a plan that cannot be run, before anything is started."""
    for flag, value in (
        ("--faults", plan.faults),
        ("--seconds", plan.seconds),
        ("--streams", plan.streams),
        ("--max-gap", plan.max_gap),
    ):
        if value <= 0:
            raise UsageError(f"{flag} must be above 0, got {value:g}")
    if not 0 <= plan.bursts <= 1:
        raise UsageError(f"--bursts must be from 0 to 1, got {plan.bursts:g}")
    if plan.least_answered < 0:
        raise UsageError(f"--min-answered must be at least 0, got {plan.least_answered}")
    chosen_kinds(plan.only)


def with_model(plan: ChaosPlan, folder: Path) -> ChaosPlan:
    """Write the model that the plan names, if it is scripted or tiny; return the plan with its folder."""
    from ullm.testing import write_scripted_model, write_tiny_model

    if plan.model == SCRIPTED:
        write_scripted_model(folder, step_seconds=STEP_SECONDS)
        runner = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")
        return dataclasses.replace(plan, model=str(folder), arguments=(*runner, *plan.arguments))
    if plan.model == TINY:
        write_tiny_model(folder)
    # In float32 a text does not depend on the rest of the batch; in smaller dtypes it may.
    model = str(folder) if plan.model == TINY else plan.model
    return dataclasses.replace(plan, model=model, arguments=("--dtype", "float32", *plan.arguments))
