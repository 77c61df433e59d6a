"""The tensors of a checkpoint, in safetensors files (one or sharded) or GGUF, before they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ullm.errors import ModelFileBroken, ModelNotFound
from ullm.hub.files import INDEX as INDEX
from ullm.hub.files import SINGLE as SINGLE
from ullm.hub.files import read_index, special_kind, uses_index
from ullm.model.layers.quantization import QuantizedWeight
from ullm.model.loading.quantized.formats import find_format
from ullm.model.loading.quantized.interface import Format, Part

MIXTRAL = re.compile(r"(.*)\.block_sparse_moe\.(gate|experts\.\d+\.w([123]))\.(.*)")
MIXTRAL_PARTS = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}
"""Mixtral's names of an expert's matrices."""
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Names of the dtypes of 16 bits in the safetensors format."""


@dataclass(frozen=True)
class TensorSource:
    """A checkpoint tensor that has not been read yet.

    Args:
        file: the file that holds it.
        shape: its shape.
        read: ``(dim, start, count)`` → that slice.
        dtype: dtype that holds its values exactly: that of the file, or float32 for quantized ones.
        codes: returns the stored codes, if they can be used as they are.
        stored: name of the dtype in a safetensors file; empty in others, and for weights made of several.
        has_codes: whether ``codes`` may return some; known without reading the tensor.
    """

    file: Path
    shape: tuple[int, ...]
    read: Callable[[int, int, int], Tensor]
    dtype: torch.dtype = torch.float32
    codes: Callable[[], QuantizedWeight | None] = lambda: None
    stored: str = ""
    has_codes: bool = False


def iterate_sources(
    path: Path, wanted: Any, name: Callable[[str], str] | None = None
) -> Iterator[tuple[str, TensorSource]]:
    """Iterate over a checkpoint's tensors; of its shards, open only those with ``wanted`` ones.

    Args:
        name: gives tensors of safetensors files their names; None: `usual_name`.
    """
    if path.suffix == ".gguf":
        from ullm.model.loading.gguf import gguf_sources

        for stored in gguf_sources(path):
            read = gguf_reader(stored.values)
            yield stored.name, TensorSource(path, stored.shape, read, stored.dtype, stored.codes)
    elif (form := find_format(path)) is not None:
        yield from renamed(quantized_sources(path, form), name)
    elif uses_index(path):
        files = shard_files(path, wanted)
        yield from renamed(_once(source for file in files for source in safetensors_sources(file)), name)
    elif (path / SINGLE).exists():
        yield from renamed(safetensors_sources(path / SINGLE), name)
    else:
        raise no_weights(path)


def no_weights(path: Path) -> ModelNotFound:
    """Return the error about a folder without weights that are read."""
    if count := len(list(path.glob("*.safetensors"))):
        return ModelNotFound(
            f"{path}: has neither {SINGLE} nor {INDEX}, which says what its {count} .safetensors files hold; "
            "fetch the model again"
        )
    return ModelNotFound(f"{path}: has neither {SINGLE} nor {INDEX}; convert the weights to safetensors")


def _once(sources: Iterator[tuple[str, TensorSource]]) -> Iterator[tuple[str, TensorSource]]:
    """Refuse a tensor that two files have: nothing tells which is meant."""
    found: dict[str, Path] = {}
    for name, source in sources:
        if name in found:
            raise _twice(name, source.file, found[name])
        found[name] = source.file
        yield name, source


def _twice(name: str, file: Path, other: Path) -> ModelFileBroken:
    return ModelFileBroken(file, f"its tensor {name!r} is in {other.name} as well; fetch the model again")


def renamed(
    sources: Iterator[tuple[str, TensorSource]], name: Callable[[str], str] | None
) -> Iterator[tuple[str, TensorSource]]:
    """Give tensors their names; see `iterate_sources`."""
    give = usual_name if name is None else name
    return ((give(stored), source) for stored, source in sources)


def usual_name(name: str) -> str:
    """Return the name that a tensor has in most checkpoints: Mixtral's experts have names of their own."""
    match = MIXTRAL.fullmatch(name)
    if match is None:
        return name
    prefix, place, part, rest = match.groups()
    inner = place if part is None else f"{place.rpartition('.')[0]}.{MIXTRAL_PARTS[part]}"
    return f"{prefix}.mlp.{inner}.{rest}"


def quantized_sources(path: Path, form: Format) -> Iterator[tuple[str, TensorSource]]:
    """Iterate over the tensors of a quantized checkpoint: those that are weights, and what others make.

    All files stay open meanwhile: the parts of a weight may be in several.

    Raises:
        ModelError: names the file, the tensor and the remedy.
    """
    if not ((path / INDEX).exists() or (path / SINGLE).exists()):
        raise no_weights(path)
    with ExitStack() as stack:
        weights: dict[str, dict[str, Part]] = {}
        found: dict[str, Path] = {}
        for file in shard_files(path, None) if uses_index(path) else [path / SINGLE]:
            tensors = stack.enter_context(open_file(file))
            for name in tensors.keys():
                if (other := found.setdefault(name, file)) != file:
                    raise _twice(name, file, other)
                part = tensors.get_slice(name)
                belongs = form.split(name, part.get_dtype())
                if belongs is None:
                    yield name, _safetensors_source(file, tensors, name)
                elif belongs[0]:
                    read = partial(tensors.get_tensor, name)
                    stored = Part(file, name, tuple(part.get_shape()), part.get_dtype(), read)
                    weights.setdefault(belongs[0], {})[belongs[1]] = stored
        for name, parts in weights.items():
            weight, file = form.weight(name, parts), next(iter(parts.values())).file
            source = TensorSource(file, weight.shape, gguf_reader(weight.values))
            if weight.codes is not None:
                source = replace(source, codes=weight.codes, has_codes=True)
            yield name, source


def names_with_codes(path: Path) -> frozenset[str]:
    """Return the weights of a quantized checkpoint whose codes the kernels can compute with."""
    form = find_format(path)
    sources = () if form is None else quantized_sources(path, form)
    return frozenset(usual_name(name) for name, source in sources if source.has_codes)


def open_file(file: Path) -> Any:
    """Open a safetensors file; raise `ModelFileBroken` if it is none."""
    if kind := special_kind(file):
        raise ModelFileBroken(file, f"{kind} and not a file; put a file there")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFileBroken(file, f"is not a complete safetensors file: {error}") from None


def gguf_reader(values: Callable[[], Tensor]) -> Callable[[int, int, int], Tensor]:
    """Return a function for `TensorSource.read`."""
    return lambda dim, start, count: values().narrow(dim, start, count)


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights, and the index that lists them.

    Raises:
        ModelFileBroken: a listed file does not exist.
    """
    if path.suffix == ".gguf":
        from ullm.model.loading.gguf_file import gguf_parts  # its libraries take long to import

        return gguf_parts(path)
    if uses_index(path):
        return [path / INDEX, *shard_files(path, None)]
    return [path / SINGLE]


def shard_files(path: Path, wanted: Any) -> list[Path]:
    """Return the files that an index names for the wanted tensors; None: for all."""
    listed = ((usual_name(name), file) for name, file in read_index(path / INDEX).items())
    files = sorted({path / file for name, file in listed if wanted is None or name in wanted})
    for file in files:
        if not file.exists():
            raise ModelFileBroken(path / INDEX, f"names {file.name}, which does not exist")
    return files


def safetensors_sources(file: Path) -> Iterator[tuple[str, TensorSource]]:
    """Iterate over the tensors of one file."""
    with open_file(file) as tensors:
        for name in tensors.keys():
            yield name, _safetensors_source(file, tensors, name)


def _safetensors_source(file: Path, tensors: Any, name: str) -> TensorSource:
    part = tensors.get_slice(name)
    shape = tuple(part.get_shape())

    def read(dim: int, start: int, count: int) -> Tensor:
        if count == shape[dim]:
            whole: Tensor = tensors.get_tensor(name)
            return whole
        index = (slice(None),) * dim + (slice(start, start + count),)
        chunk: Tensor = part[index]
        return chunk

    dtype = HALVES.get(part.get_dtype(), torch.float32)
    return TensorSource(file, shape, read, dtype, stored=part.get_dtype())
