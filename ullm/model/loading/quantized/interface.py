"""What a format of quantized checkpoints is: which tensors make a weight, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ullm.errors import ModelFileBroken, ModelUnsupported
from ullm.model.layers.quantization import QuantizedWeight

REMEDY = (
    "use an unquantized checkpoint, a GGUF file, or one of the formats in docs/how-to/choosing-a-model.md"
)


@dataclass(frozen=True)
class Part:
    """A tensor of a file, which has not been read yet.

    Args:
        file: the file that holds it.
        name: its name.
        shape: its shape.
        stored: name of its dtype in the safetensors format.
        read: returns all of it.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    stored: str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredWeight:
    """A weight that several tensors make together.

    Args:
        shape: of the weight, as a model has it: ``(out, in)`` for linear layers.
        values: computes it in float32.
        codes: returns its codes for the kernels of linear layers; None: they have no such codes.
    """

    shape: tuple[int, ...]
    values: Callable[[], Tensor]
    codes: Callable[[], QuantizedWeight] | None = None


class Format(Protocol):
    """A format of quantized checkpoints. Constructors raise `ModelUnsupported` for variants."""

    @property
    def name(self) -> str:
        """What users call it."""

    def split(self, name: str, stored: str) -> tuple[str, str] | None:
        """Return which weight a tensor belongs to, and as what; None for a tensor that is none's.

        An empty weight stands for tensors that change nothing here, such as scales of activations.

        Args:
            name: the tensor's.
            stored: name of its dtype.
        """

    def weight(self, name: str, parts: Mapping[str, Part]) -> StoredWeight:
        """Return the weight of this name.

        Args:
            parts: what `split` has called them → the tensors.

        Raises:
            ModelUnsupported, ModelFileBroken: names tensor and remedy.
        """


@dataclass(frozen=True)
class FoundConfig:
    """Where a checkpoint says how it is quantized.

    Args:
        file: the file.
        values: what it says.
    """

    file: Path
    values: Mapping[str, Any]

    def unsupported(self, what: str) -> ModelUnsupported:
        """Return the error for a variant that cannot be read."""
        return ModelUnsupported(f"{self.file}: {what} is not supported; {REMEDY}")

    def number(self, key: str, default: Any = None) -> int:
        """Return a whole number.

        Raises:
            ModelFileBroken: it is none.
        """
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelFileBroken(self.file, f"{key!r} must be a whole number, is {value!s:.40}")
        return value


def split_last(name: str, known: Mapping[str, str]) -> tuple[str, str] | None:
    """Split a tensor's name at its last dot, for formats whose weights are ``<layer>.<part>``.

    Args:
        known: last part of the name → what it is; empty: it changes nothing here.
    """
    layer, _, last = name.rpartition(".")
    if last not in known:
        return None
    return (f"{layer}.weight", known[last]) if known[last] else ("", name)


def require(name: str, parts: Mapping[str, Part], *wanted: str) -> list[Part]:
    """Return parts of a weight.

    Raises:
        ModelFileBroken: one is missing; names it.
    """
    for key in wanted:
        if key not in parts:
            some = next(iter(parts.values()))
            raise ModelFileBroken(some.file, f"tensor {name!r} has no {key!r} beside {some.name!r}")
    return [parts[key] for key in wanted]


def check_shape(part: Part, *allowed: tuple[int, ...]) -> None:
    """Check the shape of a part.

    Raises:
        ModelFileBroken: it is none of those allowed; names them.
    """
    if part.shape not in allowed:
        shapes = " or ".join(map(str, allowed))
        raise ModelFileBroken(part.file, f"tensor {part.name!r} has shape {part.shape}, expected {shapes}")
