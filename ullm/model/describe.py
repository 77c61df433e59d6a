"""``python -m ullm.model.describe``: what a model is, and whether it runs and fits, before it is loaded.

Takes the engine's options and the model's path as JSON on stdin, and writes a `Description` to stdout. A
process of its own, so that the command line never loads torch.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import msgspec
import torch

from ullm.config import EngineConfig
from ullm.errors import ModelError, OutOfMemory, UllmError
from ullm.machine import available_memory
from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.registry import build, choose_device, choose_scheme, load_model, native_class
from ullm.model.execution.verify import verify
from ullm.model.kernels.cpu.kernels import load_kernels
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.quantization import GROUP, Scheme
from ullm.model.loading.checkpoint import Checkpoint, read_checkpoint
from ullm.model.loading.sources import weight_files
from ullm.model.loading.weights import stored_dtypes
from ullm.model.memory.kv_pool import KvShape, effective_block_size, kv_bytes_per_token
from ullm.scheduling.sequence_blocks import most_blocks

LENGTHS = (2048, 8192, 32768)
"""Context lengths, in tokens, for which the memory is told, as far as the model has them; and its own."""
BITS = {"int8": 8 + 16 / GROUP, "int4": 4 + 32 / GROUP}


class Description(msgspec.Struct, kw_only=True):
    """What a model is.

    Args:
        runs: natively, through transformers' code, or not at all.
        reason: why it does not run natively, or not at all.
        quantization: what the weights are computed in: a dtype, ``int8``, ``int4``, or as stored in the file.
        parameters, weight_bytes, kv_bytes_per_token: None where only loading tells.
        memory: context length → bytes of the weights and the keys and values of one text of that length.
        window: tokens that every layer sees at most, behind which nothing is kept; 0: at least one sees all.
        available: bytes of free memory, of the CPU or the GPU.
        fits: whether the weights and one text of the shortest of these lengths fit.
        verified: what a comparison with transformers has found; empty: there was none.
    """

    architecture: str
    runs: Literal["native", "transformers", "refused"]
    reason: str = ""
    dtype: str = ""
    quantization: str = ""
    context_len: int = 0
    parameters: int | None = None
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    memory: dict[int, int] = {}
    window: int = 0
    available: int = 0
    fits: bool | None = None
    verified: str = ""


def describe(config: EngineConfig, model_path: str, *, compare: bool) -> Description:
    """Return what a model is, without loading it.

    Args:
        compare: load it after all, if it is native and fits, and compare it with transformers' code.
    """
    try:
        device = choose_device(config, None)
        checkpoint = read_checkpoint(Path(model_path), config, device)
    except UllmError as error:
        return Description(architecture="", runs="refused", reason=str(error))
    free = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    found = Description(
        architecture=checkpoint.architecture,
        runs="native",
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        context_len=checkpoint.context_len,
        available=free,
    )
    try:
        native = native_class(checkpoint, config.tp_size)
        if isinstance(native, str):
            describe_foreign(found, checkpoint, config, device, native)
        else:
            describe_native(found, build(native, checkpoint, ParallelContext()), checkpoint, config, device)
        if compare and found.runs == "native" and found.fits:
            model = load_model(checkpoint, config, device, ParallelContext(), lambda: None)
            found.verified = verify(model, checkpoint)
    except OutOfMemory:
        raise
    except ModelError as error:
        found.runs, found.reason = "refused", str(error)
    return found


def describe_native(
    found: Description, model: Decoder, checkpoint: Checkpoint, config: EngineConfig, device: torch.device
) -> None:
    """Fill in what a native model needs."""
    suits = config.cpu_kernels and device.type == "cpu" and model.suits_kernels()
    kernels = load_kernels(checkpoint.dtype) if suits else None
    scheme = choose_scheme(checkpoint, config, kernels)
    found.parameters = model.num_parameters()
    found.quantization = {"stored": "as stored in the file"}.get(scheme or "", scheme or found.dtype)
    found.weight_bytes = weight_bytes(model, checkpoint, scheme, widened=kernels is not None)
    config, varlen = config.on_device(device.type), device.type == "cuda" and model.dtype != torch.float32
    size = effective_block_size(config.block_size, varlen=varlen)
    add_memory(found, model.kv_shape, checkpoint, dataclasses.replace(config, block_size=size))


def weight_bytes(model: Decoder, checkpoint: Checkpoint, scheme: Scheme | None, *, widened: bool) -> int:
    """Return about how many bytes the weights take.

    Args:
        widened: the kernels keep the dtypes of the file.
    """
    table = model.config.vocab_size * model.config.hidden_size
    rest = model.num_parameters() - table
    if scheme == "stored":
        size = sum(file.stat().st_size for file in weight_files(checkpoint.path))
        return size + table * checkpoint.dtype.itemsize
    if scheme is not None:
        return int(rest * BITS[scheme] / 8 + table * checkpoint.dtype.itemsize)
    kept = checkpoint.dtype.itemsize
    if widened and checkpoint.dtype == torch.float32:
        kept = max(dtype.itemsize for dtype in stored_dtypes(model, checkpoint.path).values())
    return model.num_parameters() * kept


def describe_foreign(
    found: Description, checkpoint: Checkpoint, config: EngineConfig, device: torch.device, why: str
) -> None:
    """Fill in what a model of transformers needs, as far as it can be told without its weights."""
    from ullm.model.architectures.registry import refuse_gguf
    from ullm.model.architectures.transformers_loading import empty_model  # takes seconds to import
    from ullm.model.architectures.transformers_ranks import check_plan

    refuse_gguf(checkpoint, why)
    choose_scheme(checkpoint, config, None)
    found.runs, found.reason, found.quantization = "transformers", why, found.dtype
    model = empty_model(checkpoint, config)
    if config.tp_size > 1:
        check_plan(model, checkpoint, config, device, config.tp_size)
    text = model.config.get_text_config()
    found.parameters = model.num_parameters()
    found.weight_bytes = found.parameters * checkpoint.dtype.itemsize
    heads = getattr(text, "num_attention_heads", None)
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    if isinstance(heads, int) and isinstance(size, int):
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        add_memory(found, KvShape(text.num_hidden_layers, kv_heads, size, heads), checkpoint, config)


def add_memory(found: Description, shape: KvShape, checkpoint: Checkpoint, config: EngineConfig) -> None:
    """Fill in the memory for several lengths: of all tokens, or of those that a step computes and sees."""
    assert found.weight_bytes is not None
    each, most = kv_bytes_per_token(shape, checkpoint.dtype), found.context_len
    if shape.window:
        size = config.block_size
        most = min(most, size * most_blocks(shape.window, config.max_num_batched_tokens, size))
    found.window = shape.window or 0
    lengths = sorted({*(length for length in LENGTHS if length < found.context_len), found.context_len})
    found.kv_bytes_per_token = each
    found.memory = {length: found.weight_bytes + min(length, most) * each for length in lengths}
    found.fits = min(found.memory.values()) <= found.available


def main() -> int:
    """Read options, path, and whether to compare, as JSON from stdin; write the description to stdout."""
    kind = tuple[EngineConfig, str, bool]
    config, model_path, compare = msgspec.json.decode(sys.stdin.buffer.read(), type=kind)
    try:
        description = describe(config, model_path, compare=compare)
    except (UllmError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(msgspec.json.encode(description).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
