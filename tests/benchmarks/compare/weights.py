"""Bits per weight, which the roofline needs: what a server's options and its file make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from ullm.config import ModelConfig

PEER_BITS = {"int8": 8.0, "int4": 4.5, "fp8": 8.0}
"""Of other servers' quantizations, by name."""
INT8, INT4 = 8.5, 5.0
"""Of ullm's: groups of 32 share 16 bits of scale, and with four bits a minimum; see docs/performance.md."""
PLAIN = 16.0
"""Where nothing is said: bfloat16."""
DTYPE_BITS = {"float32": 32.0, "bfloat16": PLAIN, "float16": PLAIN, "auto": PLAIN}


def bits_of(options: Sequence[str]) -> float:
    """What a server's options ask for; 16 where they say nothing."""
    dtype = DTYPE_BITS.get(option(options, "--dtype"), PLAIN)
    return PEER_BITS.get(option(options, "--quantization"), dtype)


def ullm_bits(options: Sequence[str], head_share: float) -> float:
    """What ``ullm serve`` makes of the weights. It computes a GGUF file's as they are stored.

    Args:
        head_share: of all weights; four bits leave the head at eight.

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
    return stored if stored < PLAIN else plain


def gguf_bits(path: Path) -> float:
    """The bits of a GGUF file's tensors, per weight in it; what else is in the file does not count.

    Raises:
        ModelError: it cannot be read.
    """
    from ullm.model.loading.gguf_file import GgufFile  # its libraries take long to import

    tensors = GgufFile(path).tensors.values()
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return sum(tensor.num_bytes for tensor in tensors) * 8 / max(1, weights)


def option(options: Sequence[str], flag: str) -> str:
    """The value of ``--flag VALUE`` or ``--flag=VALUE``, the last one; empty if there is none."""
    found = [b for a, b in itertools.pairwise(options) if a == flag]
    found += [given.removeprefix(f"{flag}=") for given in options if given.startswith(f"{flag}=")]
    return found[-1] if found else ""


def _local(model: str) -> Path:
    """Fetched where it is a file of the hub, which the server would do, too."""
    path = Path(model).expanduser()
    if path.is_file():
        return path
    from ullm.hub import resolve

    return resolve(ModelConfig(model=model)).path
