"""Load weights from safetensors (one file or sharded) or GGUF into a model's parameters.

The modules describe where every tensor goes (`ullm.model.layers.linear.Shard`). Here names are matched and
shapes checked, and each rank reads only its slices of the memory-mapped files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ullm.errors import ModelFileBroken, ModelUnsupported
from ullm.hub.files import INDEX, SINGLE, read_index, read_json, uses_index
from ullm.logs import get_logger
from ullm.model.layers.linear import Loadable, Shard
from ullm.model.layers.quantization import QuantizedWeight, join_quantized
from ullm.model.loading.quantized.formats import find_format
from ullm.model.loading.sources import TensorSource, iterate_sources, open_file, shard_files

log = get_logger(__name__)

PLAIN = frozenset({"F64", "F32", "BF16", "F16"})
"""Names of the dtypes in the safetensors format whose numbers are the weights themselves."""
HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn\.bias|position_ids)")
"""Tensors of older checkpoints that are computed here, and change nothing."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED_ROWS = 4096
"""Rows of two matrices that are compared at a time."""


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
    unused = list[str]()
    for name, source, shards in places(model, path, unused):
        for shard in shards:
            copy_shard(name, source, shard)
        progress()
    warn_of_unused(path, [each for each in unused if not is_elsewhere(each)])


def warn_of_unused(path: Path, names: list[str]) -> None:
    """Say in one line that tensors are not used, if there are any."""
    if names:
        some = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
        log.warning(f"{path}: {len(names)} tensors have no place in the model and are not used: {some}")


def check_shapes(model: nn.Module, path: Path) -> None:
    """Check that a checkpoint has all tensors of a model, of its shapes, before there is memory for them.

    Raises:
        ModelFileBroken: it does not; names file, tensor and both shapes.
        ModelUnsupported: a tensor holds codes, and nothing says of which format.
    """
    for name, source, shards in places(model, path, []):
        check_shape(name, source, shards[0])
        _reject_codes(name, source)


def places(
    model: nn.Module, path: Path, unused: list[str]
) -> Iterator[tuple[str, TensorSource, list[Shard]]]:
    """Iterate over a checkpoint's tensors and the places in the model that they are copied to.

    Args:
        unused: gets the names of those without a place.

    Raises:
        ModelFileBroken: at the end: there are places without a tensor; names the first.
    """
    missing = targets(model)
    only_head = EMBEDDING in missing and HEAD not in missing and EMBEDDING not in tensor_names(path)
    for stored_name, source in iterate_sources(path, {*missing, HEAD} if only_head else missing.keys()):
        name = EMBEDDING if only_head and stored_name == HEAD else stored_name  # tied, and saved as the other
        if (shards := missing.pop(name, None)) is not None:
            yield name, source, shards
        elif not HARMLESS.fullmatch(name) and name != HEAD:
            unused.append(name)
    if missing:
        first = min(missing)
        shape = missing[first][0].full_shape
        raise ModelFileBroken(path, f"tensor {first!r} of shape {shape} is missing ({len(missing)} in all)")


def tensor_names(path: Path) -> set[str]:
    """Return the names of a checkpoint's tensors."""
    if path.suffix != ".gguf" and uses_index(path) and find_format(path) is None:
        return set(read_index(path / INDEX))
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
    file = shard_files(path, {name})[0] if uses_index(path) else path / SINGLE
    tensors = stack.enter_context(open_file(file))
    try:
        return tensors.get_slice(name)
    except SafetensorError as error:
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
    check_shape(name, source, shard)
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


def check_shape(name: str, source: TensorSource, shard: Shard) -> None:
    """Raise `ModelFileBroken` if a tensor has another shape than its place."""
    if source.shape != shard.full_shape:
        raise ModelFileBroken(
            source.file, f"tensor {name!r} has shape {source.shape}, the config says {shard.full_shape}"
        )


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
