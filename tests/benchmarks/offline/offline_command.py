"""``python -m tests.benchmarks offline``: ullm beside peers that need no server, on one GGUF file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tests.benchmarks.batch.batch_command import publish
from tests.benchmarks.batch.batch_report import report
from tests.benchmarks.batch.batch_rounds import BatchSetup, run_rounds
from tests.benchmarks.batch.contenders import Contender, peer_contender, ullm_contender
from tests.benchmarks.batch.engine_load import EngineLoad
from tests.benchmarks.compare.comparison_rounds import baseline_of, check_names, choose
from tests.benchmarks.compare.hardware import ModelShape, model_shape
from tests.benchmarks.compare.weight_bits import gguf_bits
from tests.benchmarks.disturbance.neighbours import beside
from tests.benchmarks.offline.offline_load import OfflineOptions
from tests.benchmarks.shared_options import JsonObject, Rounds
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.errors import UsageError
from ullm.testing.processes import psutil_module

LEVELS = (1, 4, 16)
LLAMA = "llama.cpp"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OfflinePeers:
    """The engines that take part, besides ullm's default those that have a path."""

    ullm: Annotated[
        list[str] | None,
        Parameter(
            help="NAME=OPTIONS of ullm serve, as in 'int8=--quantization int8'; may be repeated.", negative=""
        ),
    ] = None
    openvino_python: Annotated[str, Parameter(help="A Python that has openvino-genai.")] = ""
    openvino_options: JsonObject = ""
    batched_bench: Annotated[
        list[str] | None,
        Parameter(
            help=f"llama-batched-bench, or NAME=PATH of a fork's, as in ik=/path; may be repeated. "
            f"Default name: {LLAMA}.",
            negative="",
        ),
    ] = None
    batched_bench_options: Annotated[
        str, Parameter(help="More options of llama-batched-bench, in quotes.", allow_leading_hyphen=True)
    ] = ""


NO_PEERS, DEFAULT_LOAD = OfflinePeers(), OfflineOptions()


def offline(
    *,
    gguf: Annotated[Path, Parameter(help="The GGUF file that all engines load.")],
    peers: OfflinePeers = NO_PEERS,
    options: OfflineOptions = DEFAULT_LOAD,
    rounds: Rounds = 3,
    baseline: Annotated[
        str | None, Parameter(help="Participant to compare the others with; default: each peer in turn.")
    ] = None,
    output: Annotated[Path, Parameter(help="Folder for offline.md, offline.json and logs.")] = Path(
        "offline"
    ),
) -> int:
    """Measure ullm's LLM, OpenVINO GenAI and llama.cpp on a CPU, in rounds; 1 if an engine failed."""
    psutil_module()
    load = options.load(LEVELS)
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")
    if not gguf.is_file():
        raise UsageError(f"--gguf {gguf}: no such file")
    shape = model_shape(gguf)
    participants = contenders(gguf, shape, peers, load)
    if baseline is not None:
        choose(baseline, participants)
    output.mkdir(parents=True, exist_ok=True)
    setup = BatchSetup(gguf.resolve(), load, "cpu", output)
    finished = run_to_end(
        beside,
        load.neighbours,
        run_rounds,
        participants,
        setup,
        rounds,
        lambda line: stderr().print(line, markup=False),
    )
    baselines = [each.name for each in participants if each.is_peer]
    if baseline is not None or not baselines:
        baselines = [baseline_of(baseline, participants, finished.turns)]
    result = report(participants, finished, load, gguf.name, shape, baselines)
    publish(result.markdown(), result.json(), output, "offline")
    return 1 if result.errors else 0


def contenders(gguf: Path, shape: ModelShape, peers: OfflinePeers, load: EngineLoad) -> list[Contender]:
    """Return the engines to measure, in the order of the first round.

    Raises:
        UsageError: two have the same name, or options are malformed.
        ModelError: the file cannot be read.
    """
    head, bits = shape.head / shape.parameters, gguf_bits(gguf)
    participants = [
        ullm_contender(spec, gguf.resolve(), head, load, "cpu") for spec in peers.ullm or ("default=",)
    ]
    if peers.openvino_python:
        participants.append(peer_contender("openvino", peers.openvino_python, peers.openvino_options, bits))
    arguments = shlex.split(peers.batched_bench_options)
    participants += [batched_bench(spec, arguments, bits) for spec in peers.batched_bench or ()]
    check_names(participants, "--ullm or --batched-bench")
    return participants


def batched_bench(spec: str, arguments: Sequence[str], weight_bits: float) -> Contender:
    """Parse ``PATH`` or ``NAME=PATH`` of llama-batched-bench."""
    name, equals, path = spec.partition("=")
    name, path = (name.strip(), path) if equals else (LLAMA, spec)
    if not name or not path:
        raise UsageError(f"--batched-bench {spec}: expected PATH or NAME=PATH")
    options = {"arguments": list(arguments)}
    return Contender(name, path, (sys.executable,), options, weight_bits, "batched_bench.py")
