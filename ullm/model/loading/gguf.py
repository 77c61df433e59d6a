"""GGUF models in the form of Hugging Face checkpoints: config, tensors, tokenizer.

Names and metadata keys are llama.cpp's (gguf-py/gguf/constants.py). Its convert_hf_to_gguf.py permutes
Llama's query and key projections, which is undone here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType

from ullm.errors import ModelUnsupported
from ullm.model.layers.quantization import QuantizedWeight
from ullm.model.loading.gguf_blocks import has_codes, read_codes
from ullm.model.loading.gguf_file import PLAIN_TYPES, GgufFile
from ullm.model.loading.gguf_tokenizer import token_ids, write_tokenizer

__all__ = ["gguf_sources", "is_quantized", "iterate_gguf_tensors", "read_gguf_config", "write_tokenizer"]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor with Llama 3's scaling of the rotary frequencies, one divisor per frequency."""
LLAMA3_LOW_FREQ_FACTOR, LLAMA3_HIGH_FREQ_FACTOR, LLAMA3_ORIGINAL_CONTEXT = 1.0, 4.0, 8192
"""The values of every Llama 3.x config.json; only the factor differs, and GGUF keeps none of the four."""


def read_gguf_config(path: str | Path) -> dict[str, Any]:
    """Return the model's config in the form of a Hugging Face config.json.

    Args:
        path: a GGUF file of a Llama (SmolLM2, Mistral), Qwen2 or Qwen3 model.

    Raises:
        ModelNotFound: there is no such file.
        ModelFileBroken: the file is damaged or its metadata are incomplete; names the key.
        ModelUnsupported: another architecture, experts, or an unknown rotary scaling.
    """
    file = GgufFile(path)
    arch = _architecture(file)
    config = {ours: file.number(f"{arch}.{theirs}") for theirs, ours in _KEYS.items()}
    heads, kv_heads = _head_counts(file, arch)
    head_dim = file.number(f"{arch}.attention.key_length", config["hidden_size"] // heads or None)
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        **config,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": _vocab_size(file),
        "hidden_act": "silu",
        "rope_theta": float(file.number(f"{arch}.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file, arch, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "torch_dtype": _dtype_name(file),
        **token_ids(file),
    }


_HALVES = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}


@dataclass(frozen=True)
class GgufSource:
    """A tensor of a GGUF file that has not been read yet.

    Rows of Llama's query and key projections are reordered from llama.cpp's order (rotary pairs side by side)
    to transformers' (halves).

    Args:
        file: the GGUF file.
        stored_name: the tensor's name in the file.
        name: the tensor's name in a Hugging Face checkpoint.
        heads: number of heads whose rows must be reordered; 0: none.
    """

    file: GgufFile
    stored_name: str
    name: str
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, outermost dimension first."""
        return self.file.tensors[self.stored_name].shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return _HALVES.get(self.file.tensors[self.stored_name].type, torch.float32)

    def values(self) -> torch.Tensor:
        """Read the values: plain numbers keep their dtype, quantized ones become float32.

        Raises:
            ModelUnsupported: an unknown quantization.
        """
        tensor = _tensor(self.file, self.stored_name)
        return tensor[_transformers_order(self.shape[0], self.heads)] if self.heads else tensor

    def codes(self) -> QuantizedWeight | None:
        """Read the tensor's codes; None if it is not quantized, or in a format without such codes."""
        entry = self.file.tensors[self.stored_name]
        if len(entry.shape) != 2 or not has_codes(entry.type):
            return None
        codes = read_codes(self.file.raw(self.stored_name), entry.type, entry.shape)
        return codes[_transformers_order(self.shape[0], self.heads)] if self.heads else codes


def gguf_sources(path: str | Path) -> Iterator[GgufSource]:
    """Iterate over the file's tensors.

    Args:
        path: the GGUF file, which is memory-mapped.

    Raises:
        ModelNotFound: there is no such file.
        ModelFileBroken: the file is damaged.
        ModelUnsupported: an unknown architecture, tensor or quantization; names it.
    """
    file = GgufFile(path)
    arch = _architecture(file)
    heads, kv_heads = _head_counts(file, arch)
    permuted = {"q_proj": heads, "k_proj": kv_heads} if arch == "llama" else {}
    for name in file.tensors:
        if name == ROPE_FACTORS:
            continue
        hf_name = _hf_name(file, name)
        yield GgufSource(file, name, hf_name, permuted.get(hf_name.split(".")[-2], 0))


def iterate_gguf_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over names and values of the file's tensors; raise what `gguf_sources` raises."""
    for source in gguf_sources(path):
        yield source.name, source.values()


def is_quantized(path: str | Path) -> bool:
    """Return True if some matrices have fewer than 16 bits per weight."""
    plain = {*PLAIN_TYPES, GGMLQuantizationType.BF16}
    return any(entry.type not in plain for entry in GgufFile(path).tensors.values())


def _architecture(file: GgufFile) -> str:
    arch = file.require("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelUnsupported(
            f"{file.path}: GGUF models of architecture {arch!r} cannot be run, those of "
            f"{', '.join(ARCHITECTURES)} can; use the model's safetensors checkpoint"
        )
    if file.metadata.get(f"{arch}.expert_count"):
        raise ModelUnsupported(f"{file.path}: GGUF models with experts cannot be run")
    return str(arch)


def _head_counts(file: GgufFile, arch: str) -> tuple[int, int]:
    """Query heads and KV heads, which must be the same in all layers."""
    counts = (
        file.require(f"{arch}.attention.head_count"),
        file.metadata.get(f"{arch}.attention.head_count_kv"),
    )
    if any(isinstance(count, list) for count in counts):
        raise ModelUnsupported(f"{file.path}: layers with different numbers of heads cannot be run")
    heads = file.number(f"{arch}.attention.head_count")
    return heads, file.number(f"{arch}.attention.head_count_kv", heads)


def _vocab_size(file: GgufFile) -> int:
    """Return the number of rows of the embedding, which may be padded beyond the vocabulary."""
    if "token_embd.weight" not in file.tensors:
        raise file.broken("the tensor 'token_embd.weight' is missing")
    return file.tensors["token_embd.weight"].shape[0]


def _dtype_name(file: GgufFile) -> str:
    """Return the dtype to compute in: that of the matrices, or bfloat16 if they are quantized."""
    kinds = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    return "float16" if kinds <= {GGMLQuantizationType.F16, GGMLQuantizationType.F32} else "bfloat16"


def _rope_scaling(file: GgufFile, arch: str, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, arch, head_dim)
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelUnsupported(f"{file.path}: rotary scaling {kind!r} is not known")
    scaling = {"rope_type": kind, "factor": float(file.number(f"{arch}.rope.scaling.factor"))}
    original = file.metadata.get(f"{arch}.rope.scaling.original_context_length")
    return scaling if original is None else {**scaling, "original_max_position_embeddings": original}


def _llama3_scaling(file: GgufFile, arch: str, head_dim: int) -> dict[str, Any]:
    """Return the rope_scaling entry that yields the file's divisors, after checking all of them."""
    divisors = torch.from_numpy(file.values(ROPE_FACTORS).copy()).double()
    factor = round(float(divisors.max()))
    theta = float(file.number(f"{arch}.rope.freq_base", 10000.0))
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = LLAMA3_ORIGINAL_CONTEXT * frequencies / (2 * math.pi)
    smooth = (turns - LLAMA3_LOW_FREQ_FACTOR) / (LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR)
    smooth = smooth.clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise ModelUnsupported(f"{file.path}: its rotary frequency factors are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
    }


def _hf_name(file: GgufFile, name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _BLOCK_TENSOR.fullmatch(name)
    if match is None or match[2] not in _BLOCK_NAMES:
        raise ModelUnsupported(
            f"{file.path}: the tensor {name!r} has no place in a {_architecture(file)} model"
        )
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"


def _tensor(file: GgufFile, name: str) -> torch.Tensor:
    entry = file.tensors[name]
    if entry.type == GGMLQuantizationType.BF16:  # numpy has no such type, torch does
        return torch.from_numpy(file.raw(name).copy()).view(torch.bfloat16).reshape(entry.shape)
    values = file.values(name)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _transformers_order(rows: int, num_heads: int) -> torch.Tensor:
    """Return row indices that turn each head from [pair, half] into [half, pair] order."""
    return torch.arange(rows).reshape(num_heads, -1, 2).transpose(1, 2).reshape(rows)
