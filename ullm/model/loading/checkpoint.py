"""The description of a checkpoint, from its configuration, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ullm.config import EngineConfig
from ullm.errors import ModelFileBroken, ModelUnsupported
from ullm.hub.files import INDEX, SINGLE, uses_index
from ullm.logs import get_logger
from ullm.model.layers.linear_kernels import fast_bfloat16
from ullm.model.loading.eos_tokens import LANGUAGE_PARTS, eos_token_ids
from ullm.model.loading.quantized.formats import find_format
from ullm.model.loading.weights import read_config

log = get_logger(__name__)

DEFAULT_CONTEXT_LEN = 2048
"""Context length, in tokens, of configs that name none."""

CONTEXT_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"),
    *("max_seq_length", "n_ctx", "model_max_length"),
)
"""Keys of a config that say its context length; the first one that is there counts."""
EXTENDING_ROPE = ("linear", "dynamic", "yarn")
"""Kinds of scaling that extend a context beyond what the config may name as its limit."""
ORIGINAL_CONTEXT = "original_max_position_embeddings"

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
        stored_format: how the weights are quantized in safetensors files; empty: they are not.
    """

    path: Path
    hf: dict[str, Any]
    architecture: str
    context_len: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    stored_format: str = ""


def read_checkpoint(path: Path, config: EngineConfig, device: torch.device) -> Checkpoint:
    """Read a checkpoint's configuration, without its weights.

    Raises:
        ModelNotFound: there is no config.
        ModelFileBroken: the config, or the tokenizer's, cannot be read.
        ModelUnsupported: the weights are quantized in a way that is not read, or the config names no
            architecture.
    """
    hf = read_config(path)
    warn_of_two(path)
    form = find_format(path, hf)
    architectures = hf.get("architectures") or usual_architectures(hf.get("model_type"))
    if not architectures:
        raise ModelUnsupported(
            f"{path}: its config names no architecture, and no model_type that transformers knows as a "
            "causal language model"
        )
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
        stored_format=form.name if form is not None else "",
    )


def warn_of_two(path: Path) -> None:
    """Say that a folder has its weights twice, if so: in one file, which counts, and in those of an index.

    Raises:
        ModelFileBroken: the index cannot be read.
    """
    if (path / SINGLE).exists() and (path / INDEX).exists() and not uses_index(path):
        log.warning(
            f"{path}: {SINGLE} is read, as by transformers, and not the files that {INDEX} names; "
            "remove whichever is not meant"
        )


def usual_architectures(model_type: object) -> list[str]:
    """Return the causal language model that transformers has for a config without ``architectures``."""
    if not isinstance(model_type, str):
        return []
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # takes seconds

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return [name] if isinstance(name, str) else []


def knows_model_type(model_type: object) -> bool:
    """Return True if transformers has a class of configurations for this ``model_type``."""
    from transformers import CONFIG_MAPPING  # takes seconds

    return model_type in CONFIG_MAPPING if isinstance(model_type, str) else False


def check_sizes(hf: dict[str, Any], path: Path) -> None:
    """Refuse lengths that are no numbers, and counts that keep the loading busy for minutes to no end.

    Raises:
        ModelFileBroken: names the number and its limit.
    """
    file = path if path.suffix == ".gguf" else path / "config.json"
    for part in parts(hf):
        for name in CONTEXT_KEYS:
            value = part.get(name) or 1
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 1 << 40:
                raise ModelFileBroken(file, f"{name!r} must be a number of tokens, is {value!s:.40}")
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
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    stored = torch.float32 if name == "float64" else _dtype(name)
    if device.type == "cuda":
        return torch.bfloat16 if stored == torch.float32 else stored
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def choose_context_len(hf: dict[str, Any], wanted: int | None) -> int:
    """Return the context length: the model's own limit, or ``wanted``, as far as the model can have it."""
    named = [(part, int(part[name])) for part in parts(hf) for name in CONTEXT_KEYS if part.get(name)]
    part, limit = named[0] if named else (hf, DEFAULT_CONTEXT_LEN)
    if wanted is None or wanted <= limit:
        return limit if wanted is None else wanted
    longest = max(limit, extended_context(part, limit))
    if wanted > longest:
        log.warning("the context is cut to the model's own", context_len=wanted, longest=longest)
    return min(wanted, longest)


def extended_context(hf: dict[str, Any], limit: int) -> int:
    """Return the context that a rotary scaling extends to, if it is one that is not limited to ``limit``.

    A config may name the original context as its limit, as in Qwen's instructions, or the extended one.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters")
    gemma = str(hf.get("model_type")).startswith("gemma3")  # whose limit is the extended one
    if not isinstance(rope, dict) or gemma:
        return limit
    factor = rope.get("factor")
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in EXTENDING_ROPE or isinstance(factor, bool) or not isinstance(factor, int | float):
        return limit
    original = hf.get(ORIGINAL_CONTEXT) or rope.get(ORIGINAL_CONTEXT) or limit
    if kind == "dynamic":
        original = limit  # as in transformers
    extended = original * factor if isinstance(original, int | float) else limit
    return int(extended) if 1 <= extended < 1 << 40 else limit


def parts(hf: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a config, and those of the language model within it, of models that also see or hear."""
    inner = [hf[name] for name in LANGUAGE_PARTS if isinstance(hf.get(name), dict)]
    return [hf, *inner]


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelUnsupported(
            f"the config says that the weights are in {name:.40}, which is not supported; if they are not, "
            f"name with --dtype one of {', '.join(known)}"
        )
    return known[name]
