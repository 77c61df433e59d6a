"""The description of a checkpoint, from its configuration, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ullm.config import EngineConfig
from ullm.errors import ModelFileBroken, ModelUnsupported
from ullm.model.layers.linear_kernels import fast_bfloat16
from ullm.model.loading.eos_tokens import eos_token_ids
from ullm.model.loading.weights import read_config, reject_quantized

DEFAULT_CONTEXT_LEN = 2048
"""Context length, in tokens, of configs that name none."""

LAYER_COUNTS = frozenset(
    {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_local_experts", "num_experts"}
)
"""Keys of a config that say how many modules are made."""
MAX_LAYERS = 2048
"""Of layers, or of experts in a layer; published models have at most a few hundred of each."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and the options that apply to it.

    Args:
        path: the model's folder or GGUF file.
        hf: the content of config.json, or of a GGUF file's metadata in that form.
        architecture: the first one that the config names.
        context_len: most tokens of prompt and output together.
        eos_token_ids: the tokens that end a text.
        dtype: dtype to compute in.
    """

    path: Path
    hf: dict[str, Any]
    architecture: str
    context_len: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype


def read_checkpoint(path: Path, config: EngineConfig, device: torch.device) -> Checkpoint:
    """Read a checkpoint's configuration, without its weights.

    Raises:
        ModelNotFound: there is no config.
        ModelFileBroken: the config, or the tokenizer's, cannot be read.
        ModelUnsupported: the weights are quantized, or the config names no architecture.
    """
    hf = read_config(path)
    reject_quantized(hf, path)
    architectures = hf.get("architectures")
    if not architectures:
        raise ModelUnsupported(f"{path}: its config names no architecture")
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise ModelFileBroken(path, f"'architectures' must be a list of names, is {architectures!s:.40}")
    check_sizes(hf, path)
    return Checkpoint(
        path=path,
        hf=hf,
        architecture=architectures[0],
        context_len=choose_context_len(hf, config.context_len),
        eos_token_ids=eos_token_ids(hf, path, config),
        dtype=choose_dtype(config.dtype, hf, device),
    )


def check_sizes(hf: dict[str, Any], path: Path) -> None:
    """Refuse lengths that are no numbers, and counts that keep the loading busy for minutes to no end.

    Raises:
        ModelFileBroken: names the number and its limit.
    """
    file = path if path.suffix == ".gguf" else path / "config.json"
    for name in ("max_position_embeddings", "n_positions"):
        if not isinstance(hf.get(name) or 1, int | float):
            raise ModelFileBroken(file, f"{name!r} must be a number, is {hf[name]!s:.40}")
    for part in (hf, *(value for value in hf.values() if isinstance(value, dict))):
        for name in LAYER_COUNTS & part.keys():
            count = part[name]
            if isinstance(count, int | float) and count > MAX_LAYERS:
                raise ModelFileBroken(file, f"{name!r} is {count}; at most {MAX_LAYERS} are possible")


def choose_dtype(wanted: str, hf: dict[str, Any], device: torch.device) -> torch.dtype:
    """Return the dtype. ``auto``: the checkpoint's on CUDA; on CPUs bfloat16 if it is fast, else float32.

    Raises:
        ModelUnsupported: the checkpoint has another dtype.
    """
    if wanted != "auto":
        return _dtype(wanted)
    stored = _dtype(str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch."))
    if device.type == "cuda":
        return torch.bfloat16 if stored == torch.float32 else stored
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def choose_context_len(hf: dict[str, Any], wanted: int | None) -> int:
    """Return the context length: the model's own limit, or ``wanted`` if it is lower."""
    limit = int(hf.get("max_position_embeddings") or hf.get("n_positions") or DEFAULT_CONTEXT_LEN)
    return min(wanted, limit) if wanted is not None else limit


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelUnsupported(f"weights in {name} are not supported; use one of {', '.join(known)}")
    return known[name]
