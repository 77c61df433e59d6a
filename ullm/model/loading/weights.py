"""Load weights from safetensors (one file or sharded) or GGUF into a model's parameters.

The modules describe where every tensor goes (`ullm.model.layers.linear.Shard`). Here names are matched and
shapes checked, and each rank reads only its slices of the memory-mapped files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported
from ullm.hub.files import read_json
from ullm.logs import get_logger
from ullm.model.layers.linear import Loadable, RMSNorm, Shard
from ullm.model.layers.quantization import QuantizedWeight

log = get_logger(__name__)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Names of the dtypes of 16 bits in the safetensors format."""
DUMMY_SCALE = 0.02
"""Standard deviation of random weights, as in GPT-2's initialisation."""


@dataclass(frozen=True)
class TensorSource:
    """A checkpoint tensor that has not been read yet.

    Args:
        file: the file that holds it.
        shape: its shape.
        read: ``(dim, start, count)`` → that slice.
        dtype: dtype that holds its values exactly: that of the file, or float32 for quantized ones.
        codes: returns the stored codes, if they can be used as they are.
    """

    file: Path
    shape: tuple[int, ...]
    read: Callable[[int, int, int], Tensor]
    dtype: torch.dtype = torch.float32
    codes: Callable[[], QuantizedWeight | None] = lambda: None


def read_config(path: Path) -> dict[str, Any]:
    """Return the model's config in the form of a config.json.

    Raises:
        ModelNotFound: there is no config.
        ModelFileBroken: it is not a JSON object.
    """
    if path.suffix == ".gguf":
        from ullm.model.loading.gguf import read_gguf_config  # its libraries take long to import

        return read_gguf_config(path)
    return read_json(path / "config.json")


@torch.no_grad()
def load_weights(model: nn.Module, path: Path, progress: Callable[[], None]) -> None:
    """Fill the model's parameters.

    Raises:
        ModelNotFound: no weights at ``path``.
        ModelFileBroken: a file is truncated, or a tensor is missing or has another shape; names file,
            tensor and both shapes.
    """
    missing = targets(model)
    for name, source in iterate_sources(path, missing.keys()):
        shards = missing.pop(name, None)
        if shards is None:
            log.debug("tensor not used", file=str(source.file), tensor=name)
            continue
        for shard in shards:
            copy_shard(name, source, shard)
        progress()
    if missing:
        first = min(missing)
        shape = missing[first][0].full_shape
        raise ModelFileBroken(path, f"tensor {first!r} of shape {shape} is missing ({len(missing)} in all)")


def targets(model: nn.Module) -> dict[str, list[Shard]]:
    """Return, for each tensor of the checkpoint, the shards that it is copied to."""
    shards: dict[str, list[Shard]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Loadable):
            for name, shard in module.shards(prefix):
                shards.setdefault(name, []).append(shard)
    return shards


def stored_dtypes(model: nn.Module, path: Path) -> dict[str, torch.dtype]:
    """Return, for each module with weights, the narrowest dtype that holds all of its tensors exactly."""
    modules = {prefix: module for prefix, module in model.named_modules() if isinstance(module, Loadable)}
    wanted = {prefix: {name for name, _ in module.shards(prefix)} for prefix, module in modules.items()}
    sources = iterate_sources(path, set[str]().union(*wanted.values()))
    stored = {name: source.dtype for name, source in sources}
    dtypes = dict[str, torch.dtype]()
    for prefix, names in wanted.items():
        each = {stored[name] for name in names if name in stored}  # loading complains of missing ones
        dtypes[prefix] = each.pop() if len(each) == 1 else torch.float32
    return dtypes


def copy_shard(name: str, source: TensorSource, shard: Shard) -> None:
    """Read a shard's slice into its parameter, converted to its dtype.

    Raises:
        ModelFileBroken: the tensor has another shape than the config says, or cannot be read.
    """
    if source.shape != shard.full_shape:
        raise ModelFileBroken(
            source.file, f"tensor {name!r} has shape {source.shape}, the config says {shard.full_shape}"
        )
    target, count = shard.target, shard.target.shape[shard.dim]
    if isinstance(target, QuantizedWeight):
        codes = source.codes() if target.as_stored else None
        if codes is not None:
            return target.copy_(codes.narrow(shard.dim, shard.start, count))
    try:
        target.copy_(source.read(shard.dim, shard.start, count))
    except SafetensorError as error:
        raise ModelFileBroken(source.file, f"tensor {name!r} cannot be read: {error}") from None


@torch.no_grad()
def fill_dummy(model: nn.Module, seed: int = 0) -> None:
    """Fill the parameters with random weights, and norms with 1."""
    generators: dict[torch.device, torch.Generator] = {}
    norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    for parameter in model.parameters():
        if id(parameter) in norms:
            parameter.fill_(1.0)
            continue
        generator = generators.setdefault(
            parameter.device, torch.Generator(parameter.device).manual_seed(seed)
        )
        parameter.normal_(0.0, DUMMY_SCALE, generator=generator)
    for number, module in enumerate(model.modules()):
        if isinstance(weight := getattr(module, "weight", None), QuantizedWeight):
            random = torch.Generator().manual_seed(seed + number)
            weight.copy_(torch.empty(weight.shape).normal_(0.0, DUMMY_SCALE, generator=random))


def iterate_sources(path: Path, wanted: Any) -> Iterator[tuple[str, TensorSource]]:
    """Iterate over a checkpoint's tensors; of its shards, open only those with ``wanted`` ones."""
    if path.suffix == ".gguf":
        from ullm.model.loading.gguf import gguf_sources

        for stored in gguf_sources(path):
            read = gguf_reader(stored.values)
            yield stored.name, TensorSource(path, stored.shape, read, stored.dtype, stored.codes)
    elif (path / INDEX).exists():
        for file in shard_files(path, wanted):
            yield from safetensors_sources(file)
    elif (path / SINGLE).exists():
        yield from safetensors_sources(path / SINGLE)
    else:
        raise ModelNotFound(f"{path}: has neither {SINGLE} nor {INDEX}; convert the weights to safetensors")


def gguf_reader(values: Callable[[], Tensor]) -> Callable[[int, int, int], Tensor]:
    """Return a function for `TensorSource.read`."""
    return lambda dim, start, count: values().narrow(dim, start, count)


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights, and the index that lists them.

    Raises:
        ModelFileBroken: a listed file does not exist.
    """
    if path.suffix == ".gguf":
        return [path]
    if (path / INDEX).exists():
        return [path / INDEX, *shard_files(path, None)]
    return [path / SINGLE]


def shard_files(path: Path, wanted: Any) -> list[Path]:
    """Return the files that an index names for the wanted tensors; None: for all."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelFileBroken(path / INDEX, "has no 'weight_map'")
    files = sorted({path / file for name, file in weight_map.items() if wanted is None or name in wanted})
    for file in files:
        if not file.exists():
            raise ModelFileBroken(path / INDEX, f"names {file.name}, which does not exist")
    return files


def safetensors_sources(file: Path) -> Iterator[tuple[str, TensorSource]]:
    """Iterate over the tensors of one file."""
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFileBroken(file, f"is not a complete safetensors file: {error}") from None
    with handle as tensors:
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

    return TensorSource(file, shape, read, HALVES.get(part.get_dtype(), torch.float32))


def reject_quantized(hf: dict[str, Any], file: Path) -> None:
    """Refuse quantized checkpoints, which need kernels that ullm does not have.

    Raises:
        ModelUnsupported: the checkpoint is quantized; names the method.
    """
    quantization = hf.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise ModelUnsupported(
            f"{file}: the weights are quantized ({method}), which is not supported; "
            "use an unquantized checkpoint or a GGUF file"
        )
