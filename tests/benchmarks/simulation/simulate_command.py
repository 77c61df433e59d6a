"""``python -m tests.benchmarks simulate``: many replicas and very many requests, on a virtual clock.

The engine is the real one: router, schedulers, block pools and prefix index. Its workers are scripted, and
their steps take as long as those of a small model. Chats of several turns share their beginnings; workers are
lost and hang at random times. Each tenth answer is compared with what the script says.
"""

from __future__ import annotations

import logging
import sys
from itertools import product
from pathlib import Path
from typing import Annotated, get_args

from cyclopts import Parameter

from tests.benchmarks.shared_options import parse_numbers, write_report
from tests.benchmarks.simulation.simulated_run import Scenario, run_scenario
from tests.benchmarks.simulation.simulation_report import SimulationReport, write_plot
from ullm.cli.options import Json, Output
from ullm.cli.terminal import stderr
from ullm.errors import UsageError
from ullm.scheduling.routing import RoutingPolicy
from ullm.testing.processes import matplotlib_module

Numbers = Annotated[str, Parameter(help="Numbers, separated by commas; there is a run for each combination.")]


def simulate(
    *,
    replicas: Numbers = "1,4,16,64",
    requests: Numbers = "2000",
    front_ends: Annotated[
        str, Parameter(help="Numbers of front ends with connections of their own, separated by commas.")
    ] = "0",
    routing: Annotated[str, Parameter(help="Policies, separated by commas.")] = "prefix",
    faults: Annotated[int, Parameter(help="Number of workers that are lost or hang, in each run.")] = 0,
    rate: Annotated[float, Parameter(help="Requests per second and replica.")] = 15.0,
    seed: Annotated[int, Parameter(help="Seed of everything that is random.")] = 1,
    plot: Annotated[Path | None, Parameter(help="File for a plot of the processor time.")] = None,
    output: Output = None,
    json: Json = False,
) -> int:
    """Simulate engines of many replicas; print what was routed, moved and recovered, and what it cost."""
    policies = routing.split(",")
    if unknown := [policy for policy in policies if policy not in get_args(RoutingPolicy)]:
        raise UsageError(f"--routing {unknown[0]}: expected {', '.join(get_args(RoutingPolicy))}")
    if faults < 0 or rate <= 0:
        raise UsageError(f"--faults {faults} --rate {rate}: expected at least 0, and above 0")
    if plot is not None:
        matplotlib_module()  # before anything is measured
    logging.getLogger("ullm").setLevel(logging.CRITICAL)  # hundreds of losses are meant to be
    combinations = product(
        parse_numbers(replicas.split(","), "--replicas"),
        parse_numbers(front_ends.split(","), "--front-ends", least=0),
        parse_numbers(requests.split(","), "--requests"),
        policies,
    )
    runs = []
    for count, doors, asked, policy in combinations:
        stderr().print(f"{count} replicas, {doors} front ends, {asked} requests, {policy}", markup=False)
        scenario = Scenario(count, asked, policy, faults, rate, seed=seed, front_ends=doors)  # type: ignore[arg-type]
        runs.append(run_scenario(scenario))
    report = SimulationReport(runs)
    write_report(report.markdown(), report.json(), output)
    sys.stdout.write(report.json() + "\n" if json else report.markdown())
    if plot is not None:
        write_plot(runs, plot)
    return 1 if any(run.failed for run in runs) else 0
