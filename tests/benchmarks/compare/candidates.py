"""The servers to compare: commands that serve an OpenAI-compatible API, and their probes of readiness."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import scripts
from tests.benchmarks.compare.scenarios import SCENARIOS
from tests.benchmarks.compare.weight_bits import bits_of as bits_of
from tests.benchmarks.compare.weight_bits import gguf_bits, option, ullm_bits
from ullm.errors import UsageError

MODEL_LENGTH = 2048
"""Maximum tokens per sequence, for servers that need the option."""
SLOTS = 32
"""Maximum number of concurrent sequences, for servers that need the option."""


@dataclass(frozen=True)
class ServerCandidate:
    """One server to measure.

    Args:
        arguments: the command, with ``{port}`` in place of the port.
        live: path that is answered, with any status, as soon as the port is open.
        ready: path that answers 200 once requests are accepted.
        start_seconds: seconds that the start may take.
        weight_bits: bits per weight, for the roofline.
        scenarios: scenarios that it supports.
        threads: option that takes the number of threads; empty if it has none.
    """

    name: str
    arguments: tuple[str, ...]
    live: str
    ready: str
    start_seconds: float = 120.0
    weight_bits: float = 16.0
    scenarios: tuple[str, ...] = SCENARIOS
    threads: str = ""

    @property
    def is_peer(self) -> bool:
        """False for ullm."""
        return not self.name.startswith("ullm ")

    def command(self, port: int) -> list[str]:
        """Return the command to run."""
        return [part.replace("{port}", str(port)) for part in self.arguments]


def ullm_candidate(spec: str, model: str, head_share: float = 0.0) -> ServerCandidate:
    """Parse ``NAME=OPTIONS of ullm serve``; the model is ``model`` unless the options name another.

    Args:
        head_share: share of the model's weights that are the head's.

    Raises:
        UsageError: not of that form.
        ModelError: a GGUF file that cannot be found or read.
    """
    name, equals, options = spec.partition("=")
    if not equals or not name.strip() or name.strip().startswith("-"):
        raise UsageError(f"--ullm {spec}: expected NAME=OPTIONS, as in 'int8=--quantization int8' or 'bf16='")
    words = shlex.split(options)
    chosen = [] if option(words, "--model") else ["--model", model]
    command = (sys.executable, "-m", "ullm", "serve", *chosen, "--port", "{port}", *words)
    bits = ullm_bits([*chosen, *words], head_share)
    return ServerCandidate(
        f"ullm {name.strip()}", command, "/live", "/ready", weight_bits=bits, threads="--cpu-threads"
    )


def vllm_candidate(command: str, model: Path, options: str) -> ServerCandidate:
    """Return vLLM's server; ``command`` is the ``vllm`` executable, or a Python that has it."""
    program = shlex.split(command)
    if Path(program[-1]).name.startswith("python"):
        program += ["-m", "vllm.entrypoints.cli.main"]
    words = shlex.split(options)
    arguments = ["serve", str(model), "--dtype", "bfloat16", "--max-model-len", str(MODEL_LENGTH)]
    arguments += ["--port", "{port}", *words]
    return ServerCandidate("vLLM", (*program, *arguments), "/health", "/health", 300.0, bits_of(words))


def llama_candidate(program: str, gguf: Path, options: str) -> ServerCandidate:
    """Return llama.cpp's server with a GGUF file.

    Raises:
        ModelError: the file cannot be read.
    """
    arguments = ["-m", str(gguf), "--port", "{port}", "-np", str(SLOTS), *shlex.split(options)]
    if "-c" not in arguments and "--ctx-size" not in arguments:
        arguments += ["-c", str(SLOTS * MODEL_LENGTH)]
    command = (*shlex.split(program), *arguments)
    return ServerCandidate(
        "llama.cpp", command, "/health", "/health", weight_bits=gguf_bits(gguf), threads="--threads"
    )


def transformers_candidate(python: str, model: Path) -> ServerCandidate:
    """Return transformers' ``generate`` on static batches; see `tests.benchmarks.scripts.transformers_batch`.

    Only decoding is measured: static batches have neither a prefix cache nor prefill beside decoding.
    """
    script = Path(scripts.__file__).with_name("transformers_batch.py")
    command = (*shlex.split(python), str(script), str(model), "{port}", "bfloat16")
    return ServerCandidate("transformers", command, "/health", "/health", scenarios=("decode",))
