"""``ullm bench chaos``: whether a server under faults loses anything."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from ullm.chaos.chaos_report import ChaosReport
from ullm.chaos.chaos_run import ChaosPlan, chosen_kinds, run_chaos
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.errors import UsageError

SCRIPTED = "scripted"
TINY = "tiny"
STEP_SECONDS = 0.005
"""Of the scripted model."""


def chaos(plan: ChaosPlan, output: Path | None, log: Path | None, *, as_json: bool) -> int:
    """Run it and show what came of it; 1 if anything was violated. The server's log is kept then.

    Args:
        plan: its ``model`` may be ``scripted`` or ``tiny``, which are written for the run.
        output: also write the report there, as JSON.
        log: also keep the server's log there.

    Raises:
        UsageError: a plan that cannot be.
    """
    check(plan)
    folder = Path(tempfile.mkdtemp(prefix="ullm-chaos-"))
    report: ChaosReport | None = None
    try:
        report = run_to_end(run_chaos, with_model(plan, folder / "model"), folder)
    finally:
        if log is not None:
            shutil.copyfile(folder / "server.log", log)
        if report is not None and report.good:
            shutil.rmtree(folder)
        else:
            stderr().print(f"the server's log is {folder / 'server.log'}", markup=False)
    if output is not None:
        output.write_text(report.json() + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(report.json() + "\n")
    else:
        report.show(Console(highlight=False))
    return 0 if report.good else 1


def check(plan: ChaosPlan) -> None:
    """Raise `UsageError` for what cannot be run, before anything is started."""
    for flag, value in (("--faults", plan.faults), ("--seconds", plan.seconds), ("--streams", plan.streams)):
        if value <= 0:
            raise UsageError(f"{flag} must be above 0, got {value}")
    chosen_kinds(plan.only)


def with_model(plan: ChaosPlan, folder: Path) -> ChaosPlan:
    """The plan with a model that is written for it, if it names one of those."""
    from ullm.testing import write_scripted_model, write_tiny_model

    if plan.model == SCRIPTED:
        write_scripted_model(folder, step_seconds=STEP_SECONDS)
        runner = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")
        return dataclasses.replace(plan, model=str(folder), arguments=(*runner, *plan.arguments))
    if plan.model == TINY:
        write_tiny_model(folder)
    # Text is the same whatever else is in the batch in float32, not in smaller numbers.
    model = str(folder) if plan.model == TINY else plan.model
    return dataclasses.replace(plan, model=model, arguments=("--dtype", "float32", *plan.arguments))
