"""GGUF files of tiny models of transformers, written as llama.cpp's converter writes them.

Names of tensors come from the gguf package, which is the converter's own.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map

from tests.model.gguf_fixtures import finish
from tests.model.model_fixtures import VOCAB

ARCHES = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
PERMUTED = {"llama", "granite", "smollm3", "mistral3"}
Array = npt.NDArray[np.float32]


def write_gguf(path: Path, arch: str, model: Any, metadata: dict[str, Any]) -> Path:
    """Write a model of transformers as a GGUF file of ``arch``, with more metadata of that architecture."""
    config = model.config
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{arch}.{key}", value)
    writer.add_token_list([f"t{index}" for index in range(VOCAB)])
    writer.add_eos_token_id(2)
    for name, values in tensors(arch, model).items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


def head_dim(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def tensors(arch: str, model: Any) -> dict[str, Array]:
    """Return the file's tensors: renamed, and changed as the converter changes them."""
    config, found = model.config, {}
    names = get_tensor_name_map(ARCHES[arch], config.num_hidden_layers)
    stacks: dict[str, dict[int, Array]] = defaultdict(dict)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for each, part in split_experts(name, values):
            if ".experts." in each:
                prefix, _, rest = each.partition(".experts.")
                index, _, matrix = rest.partition(".")
                stacks[f"{prefix}.experts.{matrix}"][int(index)] = part
            else:
                found[gguf_name(names, each)] = changed(arch, config, each, part)
    for name, parts in stacks.items():
        found[gguf_name(names, name)] = np.stack([parts[index] for index in range(len(parts))])
    return found


def gguf_name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def split_experts(name: str, values: Array) -> list[tuple[str, Array]]:
    """Split transformers' fused experts into those of a checkpoint."""
    prefix = name.partition(".experts.")[0]
    if name.endswith("experts.gate_up_proj"):
        halves = [np.split(expert, 2) for expert in values]
        return [
            (f"{prefix}.experts.{index}.{part}.weight", half)
            for index, both in enumerate(halves)
            for part, half in zip(("gate_proj", "up_proj"), both, strict=True)
        ]
    if name.endswith("experts.down_proj"):
        return [(f"{prefix}.experts.{index}.down_proj.weight", expert) for index, expert in enumerate(values)]
    return [(name, values)]


def changed(arch: str, config: Any, name: str, values: Array) -> Array:
    """Return a tensor as the converter writes it."""
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if arch in PERMUTED and f"{part}." in name:
            pairs = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
    return values[0] if name.endswith("shared_expert_gate.weight") else values
