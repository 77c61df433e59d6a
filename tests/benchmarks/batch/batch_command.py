"""``python -m tests.benchmarks batch``: many requests at once, offline, beside other engines."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tests.benchmarks.batch.batch_load import BatchLoad
from tests.benchmarks.batch.batch_report import report
from tests.benchmarks.batch.batch_rounds import BatchSetup, run_rounds
from tests.benchmarks.batch.contenders import Contender, peer_contender, ullm_contender
from tests.benchmarks.batch.shapes import write_shape
from tests.benchmarks.compare.comparison_rounds import baseline_of, check_names, choose
from tests.benchmarks.compare.hardware import ModelShape, model_shape
from tests.benchmarks.shared_options import Baseline, JsonObject, Rounds
from ullm.bench.workload import Length
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import Seed
from ullm.cli.terminal import stderr
from ullm.config import DEFAULT_MODEL, ModelConfig
from ullm.errors import UsageError
from ullm.testing.processes import psutil_module


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BatchPeers:
    """The engines that take part, besides ullm's default those that have a Python."""

    ullm: Annotated[
        list[str] | None,
        Parameter(
            help="NAME=OPTIONS of ullm serve, as in 'eager=--enforce-eager'; may be repeated.", negative=""
        ),
    ] = None
    transformers: Annotated[str, Parameter(help="A Python that has transformers 5 (generate_batch).")] = ""
    transformers_options: JsonObject = ""
    nano_vllm: Annotated[str, Parameter(help="A Python that has nano-vllm.")] = ""
    nano_vllm_options: JsonObject = ""
    vllm: Annotated[str, Parameter(help="A Python that has vLLM.")] = ""
    vllm_options: JsonObject = ""

    def pythons(self) -> list[tuple[str, str, str]]:
        """Return engine, Python and options of each peer."""
        return [
            ("transformers", self.transformers, self.transformers_options),
            ("nano-vllm", self.nano_vllm, self.nano_vllm_options),
            ("vllm", self.vllm, self.vllm_options),
        ]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The load, as it is typed in."""

    requests: Annotated[int, Parameter(help="Number of requests, all submitted at once.")] = 256
    prompt_tokens: Annotated[str, Parameter(help="Tokens per prompt: a number or a range.")] = "100-1024"
    output_tokens: Annotated[str, Parameter(help="Tokens to generate: a number or a range.")] = "100-1024"
    single_tokens: Annotated[int, Parameter(help="Tokens that one request alone generates.")] = 256
    temperature: Annotated[float, Parameter(help="Sampling temperature; 0 is greedy.")] = 0.6
    seed: Seed = 0

    def load(self) -> BatchLoad:
        """Return the load.

        Raises:
            UsageError: it cannot be measured.
        """
        prompt = Length.parse(self.prompt_tokens, "--prompt-tokens")
        output = Length.parse(self.output_tokens, "--output-tokens")
        load = BatchLoad(self.requests, prompt, output, self.single_tokens, self.temperature, self.seed)
        load.check()
        return load


NO_PEERS, DEFAULT_LOAD = BatchPeers(), BatchOptions()


def batch(
    *,
    model: Annotated[str, Parameter(help="Hub id or folder that all engines load.")] = DEFAULT_MODEL,
    shape: Annotated[
        Literal["", "qwen3-0.6b", "tiny"],
        Parameter(help="Instead of --model: random bfloat16 weights of this shape, written below --output."),
    ] = "",
    peers: BatchPeers = NO_PEERS,
    options: BatchOptions = DEFAULT_LOAD,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Parameter(help="Device, for engines that have the choice.")
    ] = "auto",
    rounds: Rounds = 3,
    baseline: Baseline = None,
    output: Annotated[Path, Parameter(help="Folder for batch.md, batch.json and logs.")] = Path("batch"),
) -> int:
    """Submit many requests at once to each engine, offline, in rounds; 1 if an engine failed."""
    psutil_module()
    load = options.load()
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")
    output.mkdir(parents=True, exist_ok=True)
    folder = find_model(model, shape, output)
    size = model_shape(folder)
    participants = contenders(folder, size, peers, load, device)
    if baseline is not None:
        choose(baseline, participants)
    setup = BatchSetup(folder, load, device, output)
    finished = run_to_end(
        run_rounds, participants, setup, rounds, lambda line: stderr().print(line, markup=False)
    )
    base = baseline_of(baseline, participants, finished.turns)
    result = report(participants, finished, load, shape or model, size, [base])
    publish(result.markdown(), result.json(), output, "batch")
    return 1 if result.errors else 0


def find_model(model: str, shape: str, output: Path) -> Path:
    """Return the folder that all engines load."""
    if shape:
        if model != DEFAULT_MODEL:
            raise UsageError(f"--shape {shape} writes a model of its own; leave out --model {model}")
        return write_shape(shape, output / f"model-{shape}")
    from ullm.hub import resolve

    return resolve(ModelConfig(model=model)).path


def contenders(
    folder: Path, shape: ModelShape, peers: BatchPeers, load: BatchLoad, device: str
) -> list[Contender]:
    """Return the engines to measure, in the order of the first round."""
    head = shape.head / shape.parameters
    participants = [ullm_contender(spec, folder, head, load, device) for spec in peers.ullm or ("default=",)]
    participants += [
        peer_contender(engine, python, options) for engine, python, options in peers.pythons() if python
    ]
    check_names(participants, "--ullm")
    return participants


def publish(markdown: str, json: str, output: Path, name: str) -> None:
    """Write a report to ``name.md`` and ``name.json``, and as Markdown to stdout."""
    (output / f"{name}.md").write_text(markdown, encoding="utf-8")
    (output / f"{name}.json").write_text(json + "\n", encoding="utf-8")
    sys.stdout.write(markdown)
