"""GGUF models in the form of Hugging Face checkpoints: config, tensors, tokenizer.

What differs between architectures is in `ullm.model.loading.gguf_kinds`.
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
from ullm.logs import get_logger
from ullm.model.layers.quantization import QuantizedWeight
from ullm.model.loading.gguf_blocks import has_codes, read_codes
from ullm.model.loading.gguf_file import PLAIN_TYPES, GgufFile
from ullm.model.loading.gguf_keys import check_type, without_effect
from ullm.model.loading.gguf_kinds import KINDS, LONG_FACTORS, MIXTRAL, SHORT_FACTORS, GgufKind
from ullm.model.loading.gguf_tokenizer import token_ids, write_generation_config, write_tokenizer

__all__ = [
    "gguf_sources",
    "is_quantized",
    "iterate_gguf_tensors",
    "read_gguf_config",
    "write_generation_config",
    "write_tokenizer",
]

log = get_logger(__name__)

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


def read_gguf_config(path: str | Path, *, warn: bool = True) -> dict[str, Any]:
    """Return the model's config in the form of a Hugging Face config.json.

    Args:
        path: a GGUF file of one of `KINDS`.
        warn: name metadata without effect in the log, which one of the processes that read a file does.

    Raises:
        ModelNotFound: there is no such file.
        ModelFileBroken: the file is damaged or its metadata are incomplete; names the key.
        ModelUnsupported: another architecture, or an unknown rotary scaling.
    """
    file = GgufFile(path)
    check_type(file)
    arch, kind = _architecture(file)
    config = {ours: file.number(f"{arch}.{theirs}") for theirs, ours in _KEYS.items()}
    heads, kv_heads = _head_counts(file, arch)
    head_dim = file.number(f"{arch}.attention.key_length", config["hidden_size"] // heads or None)
    unknown = _check_metadata(file, arch, kind, head_dim)
    if unknown and warn:
        log.warning(f"{file.path}: metadata that have no effect here: {', '.join(unknown)}")
    config = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        **config,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": _vocab_size(file),
        "hidden_act": "silu",
        "rope_theta": float(file.number(f"{arch}.rope.freq_base", 10000.0)),
        "rope_scaling": None if SHORT_FACTORS in file.tensors else _rope_scaling(file, arch, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "torch_dtype": _dtype_name(file),
        **token_ids(file),
    }
    return config | kind.config(file, arch, config)


_MUST_BE: dict[str, tuple[Any, ...]] = {
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
}
"""Keys that would change the numbers, and their values that change nothing."""
_READ = frozenset(
    {
        *_KEYS,
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "rope.freq_base"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scale_linear"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
        *("rope.scaling.original_context_length", "rope.dimension_count", "attention.value_length"),
        *(
            "rope.scaling.finetuned",
            "attention.sliding_window",
            "vocab_size",
            "tensor_data_layout",
            "expert_count",
        ),
    }
)
"""Keys of an architecture that are acted on, or change nothing."""


def _check_metadata(file: GgufFile, arch: str, kind: GgufKind, head_dim: int) -> list[str]:
    """Refuse what would change the numbers, and return the keys that nobody knows."""
    for name in {"rope.dimension_count", "attention.value_length"} - kind.reads:
        value = file.metadata.get(f"{arch}.{name}", head_dim)
        if value != head_dim:
            raise ModelUnsupported(f"{file.path}: {arch}.{name} is {value}, and heads have {head_dim}")
    for name, neutral in _MUST_BE.items():
        if name in kind.reads:
            continue
        value = file.metadata.get(f"{arch}.{name}", neutral[0])
        if value not in neutral:
            raise ModelUnsupported(f"{file.path}: {arch}.{name} is {value}, which is not supported")
    window = file.metadata.get(f"{arch}.attention.sliding_window", 0)
    windowed = "attention.sliding_window" in kind.reads
    if not windowed and 0 < window < file.number(f"{arch}.context_length"):
        raise ModelUnsupported(f"{file.path}: {arch}.attention.sliding_window is {window}, not supported")
    known = {f"{arch}.{name}" for name in (*_READ, *_MUST_BE, *kind.reads)}
    return without_effect(file.metadata, known)


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
        offset: what was added to the values.
        index: which expert's part it is; None: it is the whole.
    """

    file: GgufFile
    stored_name: str
    name: str
    heads: int = 0
    offset: float = 0.0
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, outermost dimension first."""
        shape = self.file.tensors[self.stored_name].shape
        if self.index is not None:
            return shape[1:]
        return (1, *shape) if self.name.endswith("shared_expert_gate.weight") and len(shape) == 1 else shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return _HALVES.get(self.file.tensors[self.stored_name].type, torch.float32)

    def values(self) -> torch.Tensor:
        """Read the values: plain numbers keep their dtype, quantized ones become float32.

        Raises:
            ModelUnsupported: an unknown quantization.
        """
        tensor = _tensor(self.file, self.stored_name, self.index).reshape(self.shape)
        if self.offset:
            tensor = tensor.float() - self.offset
        return tensor[_transformers_order(self.shape[0], self.heads)] if self.heads else tensor

    def codes(self) -> QuantizedWeight | None:
        """Read the tensor's codes; None if it is not quantized, or in a format without such codes."""
        entry = self.file.tensors[self.stored_name]
        if len(self.shape) != 2 or not has_codes(entry.type):
            return None
        codes = read_codes(self.file.raw(self.stored_name, self.index), entry.type, self.shape)
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
    arch, kind = _architecture(file)
    heads, kv_heads = _head_counts(file, arch)
    permuted = {"q_proj": heads, "k_proj": kv_heads} if kind.permuted else {}
    for name, entry in file.tensors.items():
        if name in (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS):
            continue
        hf_name = _hf_name(file, kind, name)
        offset = kind.norm_offset if hf_name.endswith("norm.weight") else 0.0
        if "{}" in hf_name:
            for index in range(entry.shape[0]):
                yield GgufSource(file, name, hf_name.format(index), index=index)
        else:
            yield GgufSource(file, name, hf_name, permuted.get(hf_name.split(".")[-2], 0), offset)


def iterate_gguf_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over names and values of the file's tensors; raise what `gguf_sources` raises."""
    for source in gguf_sources(path):
        yield source.name, source.values()


def is_quantized(path: str | Path) -> bool:
    """Return True if some matrices have fewer than 16 bits per weight."""
    plain = {*PLAIN_TYPES, GGMLQuantizationType.BF16}
    return any(entry.type not in plain for entry in GgufFile(path).tensors.values())


def _architecture(file: GgufFile) -> tuple[str, GgufKind]:
    """Return the name of the architecture, with which metadata keys begin, and what it is."""
    arch = file.require("general.architecture")
    if not isinstance(arch, str) or arch not in KINDS:
        raise ModelUnsupported(
            f"{file.path}: GGUF models of architecture {arch!r} cannot be run, those of "
            f"{', '.join(KINDS)} can; use the model's safetensors checkpoint"
        )
    kind = KINDS[arch]
    if file.metadata.get(f"{arch}.expert_count") and "expert_count" not in kind.reads:
        if arch != "llama":
            raise ModelUnsupported(
                f"{file.path}: GGUF models of architecture {arch!r} with experts cannot be run"
            )
        kind = MIXTRAL
    return arch, kind


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
    # An older name of a linear factor, which counts where the newer one is missing.
    older = float(file.number(f"{arch}.rope.scale_linear", 1.0))
    factor = float(file.number(f"{arch}.rope.scaling.factor", older))
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none" if factor == 1 else "linear")
    attention = float(file.number(f"{arch}.rope.scaling.attn_factor", 1.0))
    if kind not in ("none", "linear", "yarn") or (kind != "yarn" and attention != 1):
        raise ModelUnsupported(
            f"{file.path}: rotary scaling {kind!r} with attn_factor {attention:g} is not known"
        )
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = file.metadata.get(f"{arch}.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        for ours in ("beta_fast", "beta_slow"):
            if (beta := file.metadata.get(f"{arch}.rope.scaling.yarn_{ours}")) is not None:
                scaling[ours] = beta
        if attention != 1:  # ggml multiplies it by YaRN's own
            scaling["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    return scaling


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


def _hf_name(file: GgufFile, kind: GgufKind, name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    names, match = {**_BLOCK_NAMES, **kind.names}, _BLOCK_TENSOR.fullmatch(name)
    if match is None or match[2] not in names:
        raise ModelUnsupported(
            f"{file.path}: the tensor {name!r} has no place in a model of kind {kind.model_type}"
        )
    return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"


def _tensor(file: GgufFile, name: str, index: int | None) -> torch.Tensor:
    if file.tensors[name].type == GGMLQuantizationType.BF16:  # numpy has no such type, torch does
        return torch.from_numpy(file.raw(name, index).copy()).view(torch.bfloat16)
    values = file.values(name, index)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _transformers_order(rows: int, num_heads: int) -> torch.Tensor:
    """Return row indices that turn each head from [pair, half] into [half, pair] order."""
    return torch.arange(rows).reshape(num_heads, -1, 2).transpose(1, 2).reshape(rows)
