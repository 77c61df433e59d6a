"""``python -m tests.benchmarks soak``: see that a server's costs stay flat while it runs."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tests.benchmarks.shared_options import Plot, ServerText, StepMilliseconds, split_server_options
from tests.benchmarks.soak.judge import LEAST, Tolerance
from tests.benchmarks.soak.soak_plot import draw
from tests.benchmarks.soak.soak_report import SoakReport
from tests.benchmarks.soak.soak_run import SoakPlan, run_soak
from ullm.bench.workload import Length
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import Seed
from ullm.cli.terminal import stderr
from ullm.errors import UsageError
from ullm.testing.processes import matplotlib_module, psutil_module

SCRIPTED, TINY = "scripted", "tiny"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """The run, as it is typed in."""

    model: Annotated[
        str, Parameter(help="scripted or tiny, which are written for the run, or a model as for ullm serve.")
    ] = SCRIPTED
    server: ServerText = ""
    step_ms: StepMilliseconds = 20.0
    streams: Annotated[int, Parameter(help="Clients that send one request after another.")] = 16
    seconds: Annotated[float, Parameter(help="Minimum duration in seconds.")] = 1800.0
    requests: Annotated[int, Parameter(help="Minimum number of answered requests.")] = 0
    interval: Annotated[float, Parameter(help="Seconds between two samples.")] = 10.0
    prompt_words: Annotated[str, Parameter(help="Words per prompt: a number or a range.")] = "8-64"
    output_tokens: Annotated[str, Parameter(help="Tokens to generate: a number or a range.")] = "8-64"
    seed: Seed = 0
    warm_up: Annotated[
        float, Parameter(help="Share of the run that is not judged, while the KV cache fills.")
    ] = 0.1

    def plan(self, tolerance: Tolerance) -> SoakPlan:
        """Return the plan."""
        return SoakPlan(
            model=self.model,
            arguments=split_server_options(self.server),
            streams=self.streams,
            seconds=self.seconds,
            requests=self.requests,
            interval=self.interval,
            prompt_words=Length.parse(self.prompt_words, "--prompt-words"),
            output_tokens=Length.parse(self.output_tokens, "--output-tokens"),
            seed=self.seed,
            warm_up=self.warm_up,
            tolerance=tolerance,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ToleranceOptions:
    """The growth that is tolerated."""

    max_time_growth: Annotated[
        float, Parameter(help="Tolerated growth of processor time per step, as a share.")
    ] = 0.05
    max_memory_growth: Annotated[float, Parameter(help="Tolerated growth of memory, as a share.")] = 0.03
    memory_slack: Annotated[float, Parameter(help="Tolerated growth of memory beyond that, in MiB.")] = 4.0
    max_slowdown: Annotated[
        float, Parameter(help="Tolerated loss of steps and tokens per second, as a share.")
    ] = 0.1


DEFAULT_RUN, DEFAULT_TOLERANCE = SoakOptions(), ToleranceOptions()


def soak(
    *,
    options: SoakOptions = DEFAULT_RUN,
    tolerated: ToleranceOptions = DEFAULT_TOLERANCE,
    plot: Plot = "png",
    output: Annotated[
        Path, Parameter(help="Folder for soak.md, soak.json, the plot and the server's log.")
    ] = Path("soak"),
) -> int:
    """Keep a server busy for a long time; 1 if its costs grow with time or with requests."""
    plan = options.plan(
        Tolerance(
            tolerated.max_slowdown,
            tolerated.max_time_growth,
            tolerated.max_memory_growth,
            tolerated.memory_slack,
        )
    )
    check(plan)
    psutil_module()
    if plot != "none":
        matplotlib_module()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ullm-soak-") as folder:
        chosen = with_model(plan, Path(folder) / "model", options.step_ms / 1000)
        log = output / "server.log"
        result = run_to_end(run_soak, chosen, log, lambda line: stderr().print(line, markup=False))
    publish(result, output, plot)
    return 0 if result.good else 1


def check(plan: SoakPlan) -> None:
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


def with_model(plan: SoakPlan, folder: Path, step_seconds: float) -> SoakPlan:
    """Write the model that the plan names, if it is scripted or tiny; return the plan with its folder."""
    from ullm.testing import write_scripted_model, write_tiny_model

    if plan.model == SCRIPTED:
        write_scripted_model(folder, step_seconds=step_seconds)
        runner = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")
        return dataclasses.replace(plan, model=str(folder), arguments=(*runner, *plan.arguments))
    if plan.model == TINY:
        write_tiny_model(folder)
        return dataclasses.replace(plan, model=str(folder))
    return plan


def publish(result: SoakReport, output: Path, plot: str) -> None:
    """Write the report to its files, and as Markdown to stdout."""
    markdown = result.markdown()
    (output / "soak.md").write_text(markdown, encoding="utf-8")
    (output / "soak.json").write_text(result.json() + "\n", encoding="utf-8")
    if plot != "none":
        draw(result, output / f"soak.{plot}")
    sys.stdout.write(markdown)
