"""Who is compared: a command that serves an OpenAI-compatible API, and how to know that it is ready."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ullm.bench import scripts
from ullm.bench.compare.scenarios import SCENARIOS
from ullm.errors import UsageError

MODEL_LENGTH = 2048
"""Most tokens per sequence, where a server wants to be told."""
SLOTS = 32
"""Sequences at once, where a server wants to be told."""
BITS = {"int8": 8.0, "int4": 4.5, "fp8": 8.0}
"""Per weight with its scales, by the name of a quantization."""
DTYPE_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "auto": 16.0}


@dataclass(frozen=True)
class Candidate:
    """One server to measure.

    Args:
        arguments: the command; ``{port}`` stands for the port.
        live: path that is answered, with whatever status, as soon as the port is served.
        ready: path that answers 200 once requests are taken.
        start_seconds: how long it may take until then.
        weight_bits: per weight, for the roofline.
        scenarios: what it can be measured in.
    """

    name: str
    arguments: tuple[str, ...]
    live: str
    ready: str
    start_seconds: float = 120.0
    weight_bits: float = 16.0
    scenarios: tuple[str, ...] = SCENARIOS

    def command(self, port: int) -> list[str]:
        """To be run."""
        return [part.replace("{port}", str(port)) for part in self.arguments]


def ullm_candidate(spec: str, model: str) -> Candidate:
    """``NAME=OPTIONS of ullm serve``; ``model`` unless they name another.

    Raises:
        UsageError: not of that form.
    """
    name, found, options = spec.partition("=")
    if not found or not name.strip() or name.strip().startswith("-"):
        raise UsageError(f"--ullm {spec}: expected NAME=OPTIONS, as in 'int8=--quantization int8' or 'bf16='")
    given = shlex.split(options)
    chosen = [] if "--model" in given else ["--model", model]
    command = (sys.executable, "-m", "ullm", "serve", *chosen, "--port", "{port}", *given)
    return Candidate(f"ullm {name.strip()}", command, "/live", "/ready", weight_bits=bits_of(given))


def vllm_candidate(command: str, model: Path, options: str) -> Candidate:
    """``command`` is the ``vllm`` executable, or a Python that has it."""
    program = shlex.split(command)
    if Path(program[-1]).name.startswith("python"):
        program += ["-m", "vllm.entrypoints.cli.main"]
    given = shlex.split(options)
    arguments = ["serve", str(model), "--dtype", "bfloat16", "--max-model-len", str(MODEL_LENGTH)]
    arguments += ["--port", "{port}", *given]
    return Candidate("vLLM", (*program, *arguments), "/health", "/health", 300.0, bits_of(given))


def llama_candidate(program: str, gguf: Path, options: str, parameters: int) -> Candidate:
    """llama.cpp's server with a GGUF file.

    Args:
        parameters: of the model, to know the file's bits per weight.
    """
    arguments = ["-m", str(gguf), "--port", "{port}", "-np", str(SLOTS), *shlex.split(options)]
    if "-c" not in arguments and "--ctx-size" not in arguments:
        arguments += ["-c", str(SLOTS * MODEL_LENGTH)]
    bits = gguf.stat().st_size * 8 / parameters
    return Candidate("llama.cpp", (*shlex.split(program), *arguments), "/health", "/health", weight_bits=bits)


def transformers_candidate(python: str, model: Path) -> Candidate:
    """transformers' ``generate`` on static batches; see `ullm.bench.scripts.transformers_batch`.

    Only decoding is measured: static batches have neither a prefix cache nor prefill beside decoding.
    """
    script = Path(scripts.__file__).with_name("transformers_batch.py")
    command = (*shlex.split(python), str(script), str(model), "{port}", "bfloat16")
    return Candidate("transformers", command, "/health", "/health", scenarios=("decode",))


def bits_of(options: Sequence[str]) -> float:
    """Bits per weight that a server's options ask for; 16 where they say nothing."""
    words = [word for option in options for word in option.split("=")]
    for flag, table in (("--quantization", BITS), ("--dtype", DTYPE_BITS)):
        if flag in words[:-1]:
            return table.get(words[words.index(flag) + 1], 16.0)
    return 16.0
