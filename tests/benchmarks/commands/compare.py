"""``ullm bench compare``: ullm beside its peers, in one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.compare import candidates as servers
from tests.benchmarks.compare.candidates import Candidate
from tests.benchmarks.compare.machine import ModelShape, matrix_speed, model_shape
from tests.benchmarks.compare.plot import draw
from tests.benchmarks.compare.report import Comparison, compare
from tests.benchmarks.compare.run import run_rounds
from tests.benchmarks.compare.scenarios import SCENARIOS, Load
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.config import ModelConfig
from ullm.errors import UsageError
from ullm.testing.processes import matplotlib_module, psutil_module


@dataclass(frozen=True)
class Peers:
    """What the command line points at; empty: not compared."""

    ullm: tuple[str, ...] = ()
    vllm: str = ""
    vllm_options: str = ""
    llama_server: str = ""
    llama_options: str = ""
    gguf: Path | None = None
    transformers: str = ""


def bench_compare(
    model: str, peers: Peers, load: Load, rounds: int, baseline: str | None, output: Path, plot: str
) -> int:
    """Measure, and write ``compare.md``, ``compare.json``, a plot and the servers' logs; 1 if one failed.

    Args:
        baseline: part of the name of whom the others are compared with; None: the first peer, else the first.
        output: a folder, made if it does not exist.
        plot: suffix of the plot's file, ``png`` or ``svg``; empty for none.

    Raises:
        UsageError: a peer or a scenario that cannot be.
        ModelError: the model cannot be found.
        MachineUnknown: what this machine can do could not be measured.
    """
    from ullm.hub import resolve

    psutil_module()
    if plot:
        matplotlib_module()
    check(load, rounds)
    folder = resolve(ModelConfig(model=model)).path
    shape = model_shape(folder)
    who = candidates(model, folder, peers, shape)
    base = choose(baseline, who)
    output.mkdir(parents=True, exist_ok=True)
    console = stderr()
    arithmetic = matrix_speed()
    turns = run_to_end(run_rounds, who, load, rounds, output, lambda line: console.print(line, markup=False))
    found = compare(who, turns, load, base, shape, arithmetic)
    publish(found, output, plot, load)
    return 1 if found.errors else 0


def check(load: Load, rounds: int) -> None:
    """Raise `UsageError` for what cannot be measured."""
    unknown = [name for name in load.scenarios if name not in SCENARIOS]
    if unknown or not load.scenarios:
        raise UsageError(f"--scenarios {','.join(unknown)}: expected some of {', '.join(SCENARIOS)}")
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")


def candidates(model: str, folder: Path, peers: Peers, shape: ModelShape) -> list[Candidate]:
    """Who takes part, in the order of the first round."""
    head_share = shape.head / shape.parameters
    found = [servers.ullm_candidate(spec, model, head_share) for spec in peers.ullm or ("default=",)]
    if peers.vllm:
        found.append(servers.vllm_candidate(peers.vllm, folder, peers.vllm_options))
    if peers.llama_server:
        if peers.gguf is None or not peers.gguf.is_file():
            raise UsageError("--llama-server needs --gguf FILE, the weights that it serves")
        found.append(servers.llama_candidate(peers.llama_server, peers.gguf, peers.llama_options))
    if peers.transformers:
        found.append(servers.transformers_candidate(peers.transformers, folder))
    names = [each.name for each in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--ullm names {twice[0]!r} twice")
    return found


def choose(baseline: str | None, who: Sequence[Candidate]) -> str:
    """The baseline's full name.

    Raises:
        UsageError: it is no candidate's.
    """
    peers = [each.name for each in who if not each.name.startswith("ullm ")]
    if baseline is None:
        return (peers or [who[0].name])[0]
    fitting = [each.name for each in who if baseline.lower() in each.name.lower()]
    if not fitting:
        raise UsageError(f"--baseline {baseline}: expected one of {', '.join(each.name for each in who)}")
    return fitting[0]


def publish(found: Comparison, output: Path, plot: str, load: Load) -> None:
    """Write the files, and the Markdown to stdout as well."""
    markdown = found.markdown()
    (output / "compare.md").write_text(markdown, encoding="utf-8")
    (output / "compare.json").write_text(found.json() + "\n", encoding="utf-8")
    if plot and "decode" in load.scenarios:
        draw(found, output / f"compare.{plot}", load.prompt_tokens + load.output_tokens / 2)
    sys.stdout.write(markdown)
