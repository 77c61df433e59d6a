"""Load weights from safetensors (one file or sharded) or GGUF into a model's parameters.

The modules describe where every tensor goes (`ullm.model.layers.linear.Shard`). Here names are matched and
shapes checked, and each rank reads only its slices of the memory-mapped files.
"""

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
from torch import Tensor, nn

from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported
from ullm.hub.files import read_json
from ullm.logs import get_logger
from ullm.model.layers.linear import Loadable, RMSNorm, Shard
from ullm.model.layers.quantization import QuantizedWeight, join_quantized
from ullm.model.loading.quantized.formats import find_format
from ullm.model.loading.quantized.interface import Format, Part

log = get_logger(__name__)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PLAIN = frozenset({"F64", "F32", "BF16", "F16"})
"""Names of the dtypes in the safetensors format whose numbers are the weights themselves."""
HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn\.bias|position_ids)")
"""Tensors of older checkpoints that are computed here, and change nothing."""
MIXTRAL = re.compile(r"(.*)\.block_sparse_moe\.(gate|experts\.\d+\.w([123]))\.(.*)")
MIXTRAL_PARTS = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}
"""Mixtral's names of an expert's matrices."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Names of the dtypes of 16 bits in the safetensors format."""
COMPARED_ROWS = 4096
"""Rows of two matrices that are compared at a time."""
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
def load_weights(
    model: nn.Module,
    path: Path,
    progress: Callable[[], None],
    is_elsewhere: Callable[[str], bool] = lambda _: False,
) -> None:
    """Fill the model's parameters.

    Args:
        is_elsewhere: whether another pipeline stage has the place of a tensor.

    Raises:
        ModelNotFound: no weights at ``path``.
        ModelFileBroken: a file is truncated, or a tensor is missing or has another shape; names file,
            tensor and both shapes.
    """
    missing, unused = targets(model), list[str]()
    only_head = EMBEDDING in missing and HEAD not in missing and EMBEDDING not in tensor_names(path)
    for stored_name, source in iterate_sources(path, {*missing, HEAD} if only_head else missing.keys()):
        name = EMBEDDING if only_head and stored_name == HEAD else stored_name  # tied, and saved as the other
        shards = missing.pop(name, None)
        if shards is None:
            if not HARMLESS.fullmatch(name) and name != HEAD and not is_elsewhere(name):
                unused.append(name)
            continue
        for shard in shards:
            copy_shard(name, source, shard)
        progress()
    if missing:
        first = min(missing)
        shape = missing[first][0].full_shape
        raise ModelFileBroken(path, f"tensor {first!r} of shape {shape} is missing ({len(missing)} in all)")
    if unused:
        names = ", ".join(sorted(unused)[:3]) + (", …" if len(unused) > 3 else "")
        log.warning(f"{path}: {len(unused)} tensors have no place in the model and are not used: {names}")


def tensor_names(path: Path) -> set[str]:
    """Return the names of a checkpoint's tensors."""
    if path.suffix != ".gguf" and (path / INDEX).exists() and find_format(path) is None:
        weight_map = read_json(path / INDEX).get("weight_map")
        return set(weight_map) if isinstance(weight_map, dict) else set()
    return {name for name, _ in iterate_sources(path, ())}


def lacks_prefix(path: Path) -> bool:
    """Return True if a checkpoint has the tensors of a model without its head, under names of their own."""
    if path.suffix == ".gguf" or not ((path / INDEX).exists() or (path / SINGLE).exists()):
        return False
    names = tensor_names(path)
    return EMBEDDING not in names and EMBEDDING.removeprefix("model.") in names


def has_own_head(path: Path) -> bool:
    """Return True if a checkpoint has a head that differs from its embedding, whatever its config says.

    That is so where an adapter with a trained embedding or head was merged.
    """
    if path.suffix == ".gguf" or not ((path / INDEX).exists() or (path / SINGLE).exists()):
        return False
    if not {EMBEDDING, HEAD} <= tensor_names(path):
        return False
    if find_format(path) is not None:  # one of them may be codes; both would be stored for a reason
        return True
    with ExitStack() as stack:
        embedding, head = (_open_tensor(path, name, stack) for name in (EMBEDDING, HEAD))
        if embedding.get_shape() != head.get_shape():
            return True
        starts = range(0, embedding.get_shape()[0], COMPARED_ROWS)
        ranges = [slice(start, start + COMPARED_ROWS) for start in starts]
        return not all(torch.equal(embedding[rows], head[rows]) for rows in ranges)


def _open_tensor(path: Path, name: str, stack: ExitStack) -> Any:
    """Return a tensor to be read in slices, as long as the stack lives."""
    file = shard_files(path, {name})[0] if (path / INDEX).exists() else path / SINGLE
    try:
        return stack.enter_context(safe_open(file, framework="pt")).get_slice(name)
    except (SafetensorError, OSError) as error:
        raise ModelFileBroken(file, f"is not a complete safetensors file: {error}") from None


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
    """Read a shard's slices into its parameter, converted to its dtype.

    Raises:
        ModelFileBroken: the tensor has another shape than the config says, or cannot be read.
    """
    if source.shape != shard.full_shape:
        raise ModelFileBroken(
            source.file, f"tensor {name!r} has shape {source.shape}, the config says {shard.full_shape}"
        )
    _reject_codes(name, source)
    target, dim = shard.target, shard.dim
    if isinstance(target, QuantizedWeight):
        codes = source.codes() if target.as_stored else None
        if codes is not None:
            return target.copy_(join_quantized([codes.narrow(dim, *run) for run in shard.slices], dim))
    try:
        parts = [source.read(dim, *run) for run in shard.slices]
        target.copy_(parts[0] if len(parts) == 1 else torch.cat(parts, dim))
    except SafetensorError as error:
        raise ModelFileBroken(source.file, f"tensor {name!r} cannot be read: {error}") from None


def _reject_codes(name: str, source: TensorSource) -> None:
    if source.stored and source.stored not in PLAIN:
        raise ModelUnsupported(
            f"{source.file}: tensor {name!r} is stored in {source.stored}, a quantized format without a "
            "quantization_config; use an unquantized checkpoint or a GGUF file"
        )


def reject_codes(path: Path) -> None:
    """Refuse a checkpoint whose weights are codes, which its configuration does not tell.

    Raises:
        ModelUnsupported: names the tensor and its dtype.
    """
    for name, source in iterate_sources(path, None):
        if name.endswith(".weight"):
            _reject_codes(name, source)


@torch.no_grad()
def fill_dummy(model: nn.Module, seed: int = 0) -> None:
    """Fill the parameters with random weights, and norms with 1."""
    generators: dict[torch.device, torch.Generator] = {}
    norms = {
        id(module.weight): 1 - module.offset for module in model.modules() if isinstance(module, RMSNorm)
    }
    for parameter in model.parameters():
        if id(parameter) in norms:
            parameter.fill_(norms[id(parameter)])
            continue
        generator = generators.setdefault(
            parameter.device, torch.Generator(parameter.device).manual_seed(seed)
        )
        parameter.normal_(0.0, DUMMY_SCALE, generator=generator)
    for number, module in enumerate(model.modules()):
        if isinstance(weight := getattr(module, "weight", None), QuantizedWeight):
            random = torch.Generator().manual_seed(seed + number)
            weight.copy_(torch.empty(weight.shape).normal_(0.0, DUMMY_SCALE, generator=random))


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
    elif (path / INDEX).exists():
        for file in shard_files(path, wanted):
            yield from renamed(safetensors_sources(file), name)
    elif (path / SINGLE).exists():
        yield from renamed(safetensors_sources(path / SINGLE), name)
    else:
        raise ModelNotFound(f"{path}: has neither {SINGLE} nor {INDEX}; convert the weights to safetensors")


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
        raise ModelNotFound(f"{path}: has neither {SINGLE} nor {INDEX}; convert the weights to safetensors")
    with ExitStack() as stack:
        weights: dict[str, dict[str, Part]] = {}
        for file in shard_files(path, None) if (path / INDEX).exists() else [path / SINGLE]:
            tensors = stack.enter_context(_open_file(file))
            for name in tensors.keys():
                part = tensors.get_slice(name)
                belongs = form.split(name, part.get_dtype())
                if belongs is None:
                    yield name, _safetensors_source(file, tensors, name)
                elif belongs[0]:
                    read = partial(tensors.get_tensor, name)
                    found = Part(file, name, tuple(part.get_shape()), part.get_dtype(), read)
                    weights.setdefault(belongs[0], {})[belongs[1]] = found
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


def _open_file(file: Path) -> Any:
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
    if (path / INDEX).exists():
        return [path / INDEX, *shard_files(path, None)]
    return [path / SINGLE]


def shard_files(path: Path, wanted: Any) -> list[Path]:
    """Return the files that an index names for the wanted tensors; None: for all."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelFileBroken(path / INDEX, "has no 'weight_map'")
    listed = ((usual_name(name), file) for name, file in weight_map.items())
    files = sorted({path / file for name, file in listed if wanted is None or name in wanted})
    for file in files:
        if not file.exists():
            raise ModelFileBroken(path / INDEX, f"names {file.name}, which does not exist")
    return files


def safetensors_sources(file: Path) -> Iterator[tuple[str, TensorSource]]:
    """Iterate over the tensors of one file."""
    with _open_file(file) as tensors:
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
