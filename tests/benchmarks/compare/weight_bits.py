"""Bits per weight, for the roofline, derived from a server's options and its file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from ullm.config import ModelConfig

PEER_BITS = {"int8": 8.0, "int4": 4.5, "fp8": 8.0}
"""Quantization of other servers → bits per weight."""
INT8, INT4 = 8.5, 5.0
"""Bits per weight of ullm: groups of 32 share 16 bits of scale, and with four bits a minimum, too."""
PLAIN = 16.0
"""Bits per weight without options: bfloat16."""
DTYPE_BITS = {"float32": 32.0, "bfloat16": PLAIN, "float16": PLAIN, "auto": PLAIN}


def bits_of(options: Sequence[str]) -> float:
    """Return the bits per weight that a server's options choose; 16 without such options."""
    dtype = DTYPE_BITS.get(option(options, "--dtype"), PLAIN)
    return PEER_BITS.get(option(options, "--quantization"), dtype)


def ullm_bits(options: Sequence[str], head_share: float) -> float:
    """Return the bits per weight of ``ullm serve``, which keeps weights as stored, in float32 as well.

    A folder's weights are taken to have 16 bits. Without the CPU kernels they are converted to the dtype.

    Args:
        head_share: share of the weights that are the head's, which has eight bits beside four.

    Raises:
        ModelError: a GGUF file that cannot be found or read.
    """
    plain = DTYPE_BITS.get(option(options, "--dtype"), PLAIN)
    model = option(options, "--model")
    match option(options, "--quantization"):
        case "int8":
            return INT8
        case "int4":
            return INT4 + head_share * (INT8 - INT4)
        case "none":
            return plain
    stored = gguf_bits(_local(model)) if model.lower().endswith(".gguf") else PLAIN
    return plain if stored >= PLAIN and "--no-cpu-kernels" in options else min(stored, plain)


def gguf_bits(path: Path) -> float:
    """Return the bits per weight of a GGUF file's tensors, without the rest of the file.

    Raises:
        ModelError: the file cannot be read.
    """
    from ullm.model.loading.gguf_file import GgufFile  # its libraries take long to import

    tensors = GgufFile(path).tensors.values()
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return sum(tensor.num_bytes for tensor in tensors) * 8 / max(1, weights)


def option(options: Sequence[str], flag: str) -> str:
    """Return the last value of ``--flag VALUE`` or ``--flag=VALUE``; empty if there is none."""
    values = [b for a, b in itertools.pairwise(options) if a == flag]
    values += [word.removeprefix(f"{flag}=") for word in options if word.startswith(f"{flag}=")]
    return values[-1] if values else ""


def _local(model: str) -> Path:
    """Return a model's file, fetched from the hub if need be, as the server would do."""
    path = Path(model).expanduser()
    if path.is_file():
        return path
    from ullm.hub import resolve

    return resolve(ModelConfig(model=model)).path
