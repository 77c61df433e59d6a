"""``ullm chaos``: inject faults into a server under load, and check that no request is lost."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

from ullm.chaos.chaos_plan import ChaosPlan, check
from ullm.chaos.chaos_report import ChaosReport
from ullm.chaos.chaos_run import Tell, run_chaos
from ullm.chaos.schedule import Moment
from ullm.chaos.world import World
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import ChaosOptions, split_commas
from ullm.cli.terminal import stderr

TELL_SECONDS = 10.0
"""Seconds between two lines of progress where stderr is no terminal."""


def chaos(options: ChaosOptions, *, as_json: bool) -> int:
    """Run a plan and print the report; return 1, and keep the server's log, if a verdict does not hold.

    Raises:
        UsageError: the plan cannot be run.
    """
    plan, moments = plan_of(options)
    check(plan)
    folder = Path(tempfile.mkdtemp(prefix="ullm-chaos-"))
    report: ChaosReport | None = None
    try:
        with progress(stderr()) as tell:
            report = run_to_end(partial(run_chaos, replay=moments, tell=tell), plan, folder)
    finally:
        log = folder / "server.log"
        if options.log is not None and log.exists():
            shutil.copyfile(log, options.log)
        if report is not None and report.good:
            shutil.rmtree(folder)
        elif log.exists():
            stderr().print(f"the server's log is {log}", markup=False)
    if options.output is not None:
        options.output.write_text(report.json() + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(report.json() + "\n")
    else:
        report.show(Console(highlight=False))
    return 0 if report.good else 1


def plan_of(options: ChaosOptions) -> tuple[ChaosPlan, Sequence[Moment]]:
    """Return what was asked for, and the moments of the run that it repeats, if it does.

    Raises:
        UsageError: the report to replay cannot be read.
    """
    if options.replay is not None:
        report = ChaosReport.read(options.replay)
        return report.chaos_plan(), report.plan
    only = tuple(kind for kind in split_commas(options.kinds) if kind)
    return ChaosPlan(
        options.model,
        tuple(shlex.split(options.server)),
        options.seed,
        options.faults,
        options.seconds,
        options.streams,
        bursts=options.bursts,
        only=only,
        max_gap=options.max_gap,
        min_answered=options.min_answered,
    ), ()


@contextmanager
def progress(console: Console) -> Iterator[Tell]:
    """Yield what shows how far a run is: one line that changes, or a line now and then in a log."""
    if console.is_terminal:
        with console.status("starting a server") as status:
            yield lambda stage, world: status.update(_line(stage, world))
        return
    told: dict[str, float] = {}

    def tell(stage: str, world: World) -> None:
        name = stage.lstrip("0123456789")
        if name not in told or world.seconds - told[name] >= TELL_SECONDS:
            told[name] = world.seconds
            console.print(_line(stage, world), markup=False)

    console.print("starting a server")
    yield tell


def _line(stage: str, world: World) -> str:
    counts, wrong = world.counts, len(world.violations)
    return (
        f"{world.seconds:.0f} s: {stage}; {counts['answered']} answered, {counts['refused']} refused, "
        f"{wrong} violation{'' if wrong == 1 else 's'}"
    )
