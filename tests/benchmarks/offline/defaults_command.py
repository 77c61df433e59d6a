"""``python -m tests.benchmarks defaults``: is any option of ullm faster than its default?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tests.benchmarks.batch.batch_command import find_model, publish
from tests.benchmarks.batch.batch_report import report
from tests.benchmarks.batch.batch_rounds import BatchSetup, FinishedRounds, run_rounds
from tests.benchmarks.batch.contenders import Contender, ullm_contender
from tests.benchmarks.batch.engine_load import EngineLoad
from tests.benchmarks.compare.hardware import MeasuredDevice, ModelShape, measure_device, model_shape
from tests.benchmarks.disturbance.neighbours import beside
from tests.benchmarks.offline.defaults_report import DefaultsReport, judge, suspects
from tests.benchmarks.offline.offline_load import OfflineOptions
from tests.benchmarks.offline.variants import AGAIN, DEFAULT, VARIANTS, Variant
from tests.benchmarks.shared_options import Model, Rounds
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import split_commas
from ullm.cli.terminal import stderr
from ullm.config import DEFAULT_MODEL
from ullm.errors import UsageError
from ullm.testing.processes import psutil_module

LEVELS = (1, 4, 16, 32)
DEFAULT_LOAD = OfflineOptions()


def defaults(
    *,
    model: Model = DEFAULT_MODEL,
    only: Annotated[
        list[str] | None,
        Parameter(help="Names of the variants to measure, separated by commas; default: all.", negative=""),
    ] = None,
    options: OfflineOptions = DEFAULT_LOAD,
    rounds: Rounds = 3,
    output: Annotated[Path, Parameter(help="Folder for defaults.md, defaults.json and logs.")] = Path(
        "defaults"
    ),
) -> int:
    """Measure ullm's options beside its default, on a CPU; 1 if one that changes no text is 10 % faster.

    An option that seems to be is measured in as many rounds again, because noise alone can look like it.
    """
    psutil_module()
    load = options.load(LEVELS)
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")
    variants = (AGAIN, *choose_variants(only))
    path = find_model(model, "", output)
    shape = model_shape(path)
    output.mkdir(parents=True, exist_ok=True)
    setup = BatchSetup(path, load, "cpu", output)
    result = run_to_end(
        beside,
        load.neighbours,
        measure,
        setup,
        model,
        shape,
        variants,
        rounds,
        lambda line: stderr().print(line, markup=False),
    )
    publish(result.markdown(f"ullm {DEFAULT.name}"), result.json(), output, "defaults")
    return 1 if result.beaten or result.figures.errors else 0


def choose_variants(only: list[str] | None) -> tuple[Variant, ...]:
    """Return the variants to measure.

    Raises:
        UsageError: there is no such variant.
    """
    if only is None:
        return VARIANTS
    known = {variant.name: variant for variant in VARIANTS}
    names = split_commas(only)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--only {','.join(unknown)}: expected some of {', '.join(known)}")
    return tuple(known[name] for name in names)


async def measure(
    setup: BatchSetup,
    model: str,
    shape: ModelShape,
    variants: Sequence[Variant],
    rounds: int,
    say: Callable[[str], None],
    measure_limits: Callable[[str], MeasuredDevice] = measure_device,
) -> DefaultsReport:
    """Measure all variants beside the default, and those that seem to beat it once more.

    Args:
        measure_limits: measures the device before each turn.
    """

    def judged(finished: FinishedRounds) -> DefaultsReport:
        figures = report(participants, finished, setup.load, model, shape, [default.name])
        return judge(figures, finished.turns, default.name, variants)

    participants = contenders((DEFAULT, *variants), setup.model, shape, setup.load)
    default = participants[0]
    finished = await run_rounds(participants, setup, rounds, say, measure_limits)
    result = judged(finished)
    if faster := suspects(result, variants):
        say(f"to be measured again: {', '.join(variant.name for variant in faster)}")
        again = contenders((DEFAULT, *faster), setup.model, shape, setup.load)
        result = judged(await run_rounds(again, setup, rounds, say, measure_limits, before=finished))
    return result


def contenders(
    variants: Sequence[Variant], model: Path, shape: ModelShape, load: EngineLoad
) -> list[Contender]:
    """Return ullm with the options of each variant."""
    head = shape.head / shape.parameters
    return [ullm_contender(variant.spec, model, head, load, "cpu") for variant in variants]
