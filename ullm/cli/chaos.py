"""``ullm chaos``: inject faults into a server under load, and check that no request is lost."""

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
"""Duration of a step of the scripted model."""


def chaos(plan: ChaosPlan, output: Path | None, log: Path | None, *, as_json: bool) -> int:
    """Run the plan and print the report; return 1, and keep the server's log, if a verdict does not hold.

    Args:
        plan: its ``model`` may be ``scripted`` or ``tiny``, which are written for the run.
        output: file for the report as JSON.
        log: file for the server's log.

    Raises:
        UsageError: the plan cannot be run.
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
    """Raise `UsageError` for a plan that cannot be run, before anything is started."""
    for flag, value in (("--faults", plan.faults), ("--seconds", plan.seconds), ("--streams", plan.streams)):
        if value <= 0:
            raise UsageError(f"{flag} must be above 0, got {value}")
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
