"""``ullm bench batch``: many requests at once, offline, beside other engines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.batch.engines import PEERS, Contender, peer_contender, ullm_contender
from tests.benchmarks.batch.load import BatchLoad
from tests.benchmarks.batch.report import BatchReport, report
from tests.benchmarks.batch.run import Bench, run_rounds
from tests.benchmarks.batch.shapes import write_shape
from tests.benchmarks.compare.machine import ModelShape, model_shape
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.config import DEFAULT_MODEL, ModelConfig
from ullm.errors import UsageError
from ullm.testing.processes import psutil_module


@dataclass(frozen=True)
class Peers:
    """What the command line points at.

    Args:
        ullm: ``NAME=OPTIONS``; none: one with the defaults.
        pythons: engine of `PEERS` → Python that has it; empty: not measured.
        options: engine → JSON object of its own options.
    """

    ullm: tuple[str, ...] = ()
    pythons: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, str], ...] = ()


def bench_batch(
    model: str,
    shape: str,
    peers: Peers,
    load: BatchLoad,
    device: str,
    rounds: int,
    baseline: str | None,
    output: Path,
) -> int:
    """Measure, and write ``batch.md``, ``batch.json`` and logs; 1 if an engine failed.

    Args:
        model: hub id or folder; the default with ``shape``.
        shape: name of a shape whose random weights are written below ``output``; empty: ``model``.
        baseline: part of the name of whom the others are compared with; None: the first peer that was
            measured, else the first.
        output: a folder, made if it does not exist.

    Raises:
        UsageError: what cannot be measured.
        ModelError: the model cannot be found.
        MachineUnknown: what the device can do could not be measured.
    """
    psutil_module()
    load.check()
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")
    output.mkdir(parents=True, exist_ok=True)
    console = stderr()
    folder = find_model(model, shape, output)
    size = model_shape(folder)
    who = contenders(folder, size, peers, load, device)
    if baseline is not None:
        choose(baseline, who)
    bench = Bench(folder, load, device, output)
    turns, asked = run_to_end(run_rounds, who, bench, rounds, lambda line: console.print(line, markup=False))
    done = {turn.candidate for turn in turns if turn.figures is not None}
    base = choose(baseline, who if baseline else [each for each in who if each.name in done] or who)
    found = report(who, turns, asked, load, shape or model, size, base)
    publish(found, output)
    return 1 if found.errors else 0


def find_model(model: str, shape: str, output: Path) -> Path:
    """The folder that all engines load."""
    if shape:
        if model != DEFAULT_MODEL:
            raise UsageError(f"--shape {shape} writes a model of its own; leave out --model {model}")
        return write_shape(shape, output / f"model-{shape}")
    from ullm.hub import resolve

    return resolve(ModelConfig(model=model)).path


def contenders(
    folder: Path, shape: ModelShape, peers: Peers, load: BatchLoad, device: str
) -> list[Contender]:
    """Who takes part, in the order of the first round."""
    head = shape.head / shape.parameters
    found = [ullm_contender(spec, folder, head, load, device) for spec in peers.ullm or ("default=",)]
    options = dict(peers.options)
    found += [
        peer_contender(engine, python, options.get(engine, "")) for engine, python in peers.pythons if python
    ]
    names = [each.name for each in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--ullm names {twice[0]!r} twice")
    return found


def choose(baseline: str | None, who: Sequence[Contender]) -> str:
    """The baseline's full name.

    Raises:
        UsageError: it does not take part.
    """
    if baseline is None:
        return next((each.name for each in who if each.engine in PEERS), who[0].name)
    fitting = [each.name for each in who if baseline.lower() in each.name.lower()]
    if not fitting:
        raise UsageError(f"--baseline {baseline}: expected one of {', '.join(each.name for each in who)}")
    return fitting[0]


def publish(found: BatchReport, output: Path) -> None:
    """Write the files, and the Markdown to stdout as well."""
    markdown = found.markdown()
    (output / "batch.md").write_text(markdown, encoding="utf-8")
    (output / "batch.json").write_text(found.json() + "\n", encoding="utf-8")
    sys.stdout.write(markdown)
