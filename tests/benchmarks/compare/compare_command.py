"""``python -m tests.benchmarks compare``: ullm beside its peers, over HTTP."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tests.benchmarks.compare import candidates as servers
from tests.benchmarks.compare.candidates import ServerCandidate
from tests.benchmarks.compare.comparison import Comparison, condense
from tests.benchmarks.compare.comparison_plot import draw
from tests.benchmarks.compare.comparison_rounds import baseline_of, check_names, choose, run_rounds
from tests.benchmarks.compare.hardware import ModelShape, model_shape
from tests.benchmarks.compare.scenarios import SCENARIOS, ComparisonLoad
from tests.benchmarks.shared_options import Baseline, Plot, Rounds
from ullm.cli.bench import DEFAULT_LEVELS, parse_concurrency
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import Seed, split_commas
from ullm.cli.terminal import stderr
from ullm.config import DEFAULT_MODEL, ModelConfig
from ullm.errors import UsageError
from ullm.testing.processes import matplotlib_module, psutil_module


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ComparePeers:
    """The servers that take part; a peer with an empty command does not."""

    ullm: Annotated[
        list[str] | None,
        Parameter(
            help="NAME=OPTIONS of ullm serve, as in 'int8=--quantization int8'; may be repeated.", negative=""
        ),
    ] = None
    vllm: Annotated[str, Parameter(help="The vllm executable, or a Python that has it.")] = ""
    vllm_options: Annotated[
        str, Parameter(help="More options of vllm serve, in quotes.", allow_leading_hyphen=True)
    ] = ""
    llama_server: Annotated[str, Parameter(help="llama.cpp's llama-server.")] = ""
    llama_options: Annotated[
        str, Parameter(help="More options of llama-server, in quotes.", allow_leading_hyphen=True)
    ] = ""
    gguf: Annotated[
        Path | None,
        Parameter(help="The weights that --llama-server serves; default: --model, if it is a file."),
    ] = None
    transformers: Annotated[str, Parameter(help="A Python that has transformers; static batches.")] = ""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The load, as it is typed in."""

    concurrency: Annotated[
        list[str] | None, Parameter(help="Numbers of concurrent streams. Default: 1,4,16,32.", negative="")
    ] = None
    scenarios: Annotated[
        list[str] | None, Parameter(help=f"Scenarios to run. Default: {','.join(SCENARIOS)}.", negative="")
    ] = None
    output_tokens: Annotated[int, Parameter(help="Tokens to generate per stream.")] = 128
    seed: Seed = 0

    def load(self) -> ComparisonLoad:
        """Return the load.

        Raises:
            UsageError: no such scenario, or a concurrency that is not a number.
        """
        levels = (
            DEFAULT_LEVELS if self.concurrency is None else parse_concurrency(split_commas(self.concurrency))
        )
        scenarios = SCENARIOS if self.scenarios is None else tuple(split_commas(self.scenarios))
        return ComparisonLoad(tuple(levels), scenarios, output_tokens=self.output_tokens, seed=self.seed)


NO_PEERS, DEFAULT_LOAD = ComparePeers(), CompareOptions()


def compare(
    *,
    model: Annotated[str, Parameter(help="As ullm serve --model; peers get its folder.")] = DEFAULT_MODEL,
    peers: ComparePeers = NO_PEERS,
    options: CompareOptions = DEFAULT_LOAD,
    rounds: Rounds = 3,
    baseline: Baseline = None,
    plot: Plot = "png",
    output: Annotated[Path, Parameter(help="Folder for compare.md, compare.json, the plot and logs.")] = Path(
        "compare"
    ),
) -> int:
    """Measure ullm beside vLLM, llama.cpp and transformers, one at a time, in rounds; 1 if one failed."""
    from ullm.hub import resolve

    psutil_module()
    if plot != "none":
        matplotlib_module()
    load = options.load()
    check(load, rounds)
    folder = resolve(ModelConfig(model=model)).path
    shape = model_shape(folder)
    participants = candidates(model, folder, peers, shape)
    choose(baseline, participants)
    output.mkdir(parents=True, exist_ok=True)
    turns = run_to_end(
        run_rounds, participants, load, rounds, output, lambda line: stderr().print(line, markup=False)
    )
    base = baseline_of(baseline, participants, turns)
    result = condense(participants, turns, load, base, shape)
    publish(result, output, plot, load)
    return 1 if result.errors else 0


def check(load: ComparisonLoad, rounds: int) -> None:
    """Raise `UsageError` for a load that cannot be measured."""
    unknown = [name for name in load.scenarios if name not in SCENARIOS]
    if unknown or not load.scenarios:
        raise UsageError(f"--scenarios {','.join(unknown)}: expected some of {', '.join(SCENARIOS)}")
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")


def candidates(model: str, folder: Path, peers: ComparePeers, shape: ModelShape) -> list[ServerCandidate]:
    """Return the servers to measure, in the order of the first round."""
    head_share = shape.head / shape.parameters
    participants = [servers.ullm_candidate(spec, model, head_share) for spec in peers.ullm or ("default=",)]
    if peers.vllm:
        participants.append(servers.vllm_candidate(peers.vllm, folder, peers.vllm_options))
    if peers.llama_server:
        gguf = peers.gguf or folder
        if not gguf.is_file():
            raise UsageError("--llama-server needs --gguf FILE, the weights that it serves")
        participants.append(servers.llama_candidate(peers.llama_server, gguf, peers.llama_options))
    if peers.transformers:
        participants.append(servers.transformers_candidate(peers.transformers, folder))
    check_names(participants, "--ullm")
    return participants


def publish(result: Comparison, output: Path, plot: str, load: ComparisonLoad) -> None:
    """Write the report to its files, and as Markdown to stdout."""
    markdown = result.markdown()
    (output / "compare.md").write_text(markdown, encoding="utf-8")
    (output / "compare.json").write_text(result.json() + "\n", encoding="utf-8")
    if plot != "none" and "decode" in load.scenarios:
        draw(result, output / f"compare.{plot}", load.prompt_tokens + load.output_tokens / 2)
    sys.stdout.write(markdown)
