"""``python -m tests.benchmarks disturbance``: ullm beside its peers on less than a whole machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tests.benchmarks.batch.batch_command import publish
from tests.benchmarks.compare.compare_command import ComparePeers, candidates
from tests.benchmarks.compare.comparison_rounds import baseline_of, choose
from tests.benchmarks.compare.hardware import model_shape
from tests.benchmarks.disturbance.disturbance_load import DisturbanceLoad
from tests.benchmarks.disturbance.disturbance_report import report
from tests.benchmarks.disturbance.disturbance_rounds import run_rounds
from tests.benchmarks.disturbance.disturbances import DISTURBANCES, Disturbance
from tests.benchmarks.shared_options import Baseline, Rounds
from ullm.cli.bench import parse_concurrency
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import Seed, split_commas
from ullm.cli.terminal import stderr
from ullm.config import DEFAULT_MODEL, ModelConfig
from ullm.errors import UsageError
from ullm.testing.processes import psutil_module

LEVELS = ["1", "4", "16"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DisturbanceOptions:
    """The load, as it is typed in."""

    concurrency: Annotated[
        list[str] | None,
        Parameter(help=f"Numbers of concurrent streams. Default: {','.join(LEVELS)}.", negative=""),
    ] = None
    output_tokens: Annotated[int, Parameter(help="Tokens to generate per request.")] = 32
    seconds: Annotated[
        float,
        Parameter(help="Seconds to send requests for each number of streams; those sent are finished."),
    ] = 8.0
    seed: Seed = 0

    def load(self) -> DisturbanceLoad:
        """Return the load.

        Raises:
            UsageError: it cannot be measured.
        """
        levels = parse_concurrency(split_commas(self.concurrency) or LEVELS)
        if self.output_tokens < 1:
            raise UsageError(f"--output-tokens must be at least 1, got {self.output_tokens}")
        if self.seconds <= 0:
            raise UsageError(f"--seconds must be above 0, got {self.seconds:g}")
        return DisturbanceLoad(
            tuple(levels), output_tokens=self.output_tokens, seed=self.seed, seconds=self.seconds
        )


NO_PEERS, DEFAULT_LOAD = ComparePeers(), DisturbanceOptions()


def disturbance(
    *,
    model: Annotated[
        str, Parameter(help="As ullm serve --model; peers get its folder or file.")
    ] = DEFAULT_MODEL,
    peers: ComparePeers = NO_PEERS,
    only: Annotated[
        list[str] | None,
        Parameter(help="Names of the disturbances, separated by commas; default: all.", negative=""),
    ] = None,
    options: DisturbanceOptions = DEFAULT_LOAD,
    rounds: Rounds = 3,
    baseline: Baseline = None,
    output: Annotated[Path, Parameter(help="Folder for disturbance.md, disturbance.json and logs.")] = Path(
        "disturbance"
    ),
) -> int:
    """Measure servers beside busy neighbours, under quotas and the like; 1 if ullm keeps too little.

    Quotas are those of control groups and need root.
    """
    from ullm.hub import resolve

    psutil_module()
    load, chosen = options.load(), choose_disturbances(only)
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")
    path = resolve(ModelConfig(model=model)).path
    participants = candidates(model, path, peers, model_shape(path))
    choose(baseline, participants)
    output.mkdir(parents=True, exist_ok=True)
    finished = run_to_end(
        run_rounds,
        participants,
        chosen,
        load,
        rounds,
        output,
        lambda line: stderr().print(line, markup=False),
    )
    base = baseline_of(baseline, participants, finished.all())
    result = report(participants, chosen, finished, load, path.name, base)
    publish(result.markdown(), result.json(), output, "disturbance")
    return 0 if result.good else 1


def choose_disturbances(only: list[str] | None) -> list[Disturbance]:
    """Return the disturbances to measure, and those that they are beside.

    Raises:
        UsageError: there is no such disturbance.
    """
    known = {each.name: each for each in DISTURBANCES}
    names = split_commas(only) or list(known)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--only {','.join(unknown)}: expected some of {', '.join(known)}")
    beside = {known[name].beside for name in names}
    wanted = {*names, *beside, *(known[name].beside for name in beside)}
    return [each for each in DISTURBANCES if each.name in wanted]
