"""``ullm bench soak``: whether a server's costs stay flat while it runs."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.soak.judge import LEAST
from tests.benchmarks.soak.plot import draw
from tests.benchmarks.soak.report import Soak
from tests.benchmarks.soak.run import Plan, run_soak
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.errors import UsageError
from ullm.testing.processes import matplotlib_module, psutil_module

SCRIPTED, TINY = "scripted", "tiny"


def soak(plan: Plan, step_ms: float, output: Path, plot: str) -> int:
    """Run it, and write ``soak.md``, ``soak.json``, a plot and the server's log; 1 if a cost grew.

    Args:
        plan: its ``model`` may be ``scripted`` or ``tiny``, which are written for the run.
        step_ms: duration of a step of the scripted model.
        output: a folder, made if it does not exist.
        plot: suffix of the plot's file, ``png`` or ``svg``; empty for none.

    Raises:
        UsageError: a plan that cannot be.
    """
    check(plan)
    psutil_module()
    if plot:
        matplotlib_module()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ullm-soak-") as folder:
        chosen = with_model(plan, Path(folder) / "model", step_ms / 1000)
        log = output / "server.log"
        found = run_to_end(run_soak, chosen, log, lambda line: stderr().print(line, markup=False))
    publish(found, output, plot)
    return 0 if found.good else 1


def check(plan: Plan) -> None:
    """Raise `UsageError` for what cannot be run, before anything is started."""
    for flag, value in (
        ("--seconds", plan.seconds),
        ("--interval", plan.interval),
        ("--streams", plan.streams),
    ):
        if value <= 0:
            raise UsageError(f"{flag} must be above 0, got {value}")
    if not 0 <= plan.warm_up < 1:
        raise UsageError(f"--warm-up must be at least 0 and below 1, got {plan.warm_up}")
    if plan.seconds * (1 - plan.warm_up) < (2 * LEAST + 1) * plan.interval:
        raise UsageError(
            f"--interval {plan.interval:g} is too long for --seconds {plan.seconds:g}: "
            f"a beginning and an end of {LEAST} intervals each are compared; at most "
            f"{plan.seconds * (1 - plan.warm_up) / (2 * LEAST + 1):.2g} would do"
        )


def with_model(plan: Plan, folder: Path, step_seconds: float) -> Plan:
    """The plan with a model that is written for it, if it names one of those."""
    from ullm.testing import write_scripted_model, write_tiny_model

    if plan.model == SCRIPTED:
        write_scripted_model(folder, step_seconds=step_seconds)
        runner = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")
        return dataclasses.replace(plan, model=str(folder), arguments=(*runner, *plan.arguments))
    if plan.model == TINY:
        write_tiny_model(folder)
        return dataclasses.replace(plan, model=str(folder))
    return plan


def publish(found: Soak, output: Path, plot: str) -> None:
    """Write the files, and the Markdown to stdout as well."""
    markdown = found.markdown()
    (output / "soak.md").write_text(markdown, encoding="utf-8")
    (output / "soak.json").write_text(found.json() + "\n", encoding="utf-8")
    if plot:
        draw(found, output / f"soak.{plot}")
    sys.stdout.write(markdown)
