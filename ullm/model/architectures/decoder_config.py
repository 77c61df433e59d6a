"""Shape and variant of a decoder, as the native classes read it from their config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ullm.errors import ModelUnsupported
from ullm.model.layers.layer_ops import Activation, Rope
from ullm.model.layers.rope import check_rope

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
"""Fields of a `DecoderConfig` that count something; `build` checks the layers."""
MAX_SIZE = 1 << 31
"""Of a dimension; published models have vocabularies of less than a million, and all else is smaller."""
MAX_HEAD_DIM = 1 << 16
"""Published models have at most 512."""
NORMS = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "around": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}
"""Where a layer has norms → their names in checkpoints, in the order of `Norms`."""


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of an MLP.

    Args:
        count: number of experts.
        chosen: number of experts for each token.
        size: number of hidden units of one.
        shared_size: number of hidden units of the expert that all tokens have, which has a gate; 0: none.
        normalize: the weights of the chosen experts add up to 1.
        layers: per layer, whether it has experts.
    """

    count: int
    chosen: int
    size: int
    shared_size: int = 0
    normalize: bool = True
    layers: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and variant of a decoder. Sizes are those of the whole model, not of one rank.

    Args:
        context_len: number of positions to prepare the rotary embedding for.
        rope: the checkpoint's ``rope_parameters``.
        sliding_windows: per layer, keys that a query sees; None: all.
        local_rope: rotary parameters of layers with a sliding window; None: the same.
        no_rope: per layer, whether it has no rotary embedding; empty: all have one.
        qk_norm: normalise queries and keys before the rotation.
        norm_all_heads: not each head by itself, but all together.
        norms: a layer's norms are before attention and MLP, or of what they return, or both.
        norm_offset: see `RMSNorm`.
        fused: the checkpoint has queries, keys and values in one tensor, and gate and up.
        attention_scale: factor of the scores; None: ``head_dim ** -0.5``.
        attention_softcap, logit_softcap: see `Attend`; None: none.
        embedding_scale, residual_scale, logit_scale: factors of the embedding, of what attention and MLP
            return, and of the logits.
        experts: mixtures of experts in some layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    context_len: int
    rope: dict[str, Any]
    sliding_windows: tuple[int | None, ...]
    local_rope: dict[str, Any] | None = None
    no_rope: tuple[bool, ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_all_heads: bool = False
    norms: Literal["before", "around", "after"] = "before"
    norm_offset: float = 0.0
    activation: Activation = "silu"
    fused: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    experts: ExpertsConfig | None = None

    def check(self) -> None:
        """Check what a config may have wrong.

        Raises:
            ValueError: a value of another type, a size that is none, or a rotary scaling that makes no
                frequencies; names it.
        """
        try:
            msgspec.convert(dataclasses.asdict(self), DecoderConfig)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 1")
            most = MAX_HEAD_DIM if name == "head_dim" else MAX_SIZE
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}, and can be at most {most}")
        for name in ("sliding_windows", "no_rope"):
            if len(getattr(self, name)) not in (
                {self.num_layers} if name == "sliding_windows" else {0, self.num_layers}
            ):
                raise ValueError(f"{name} are {len(getattr(self, name))}, of {self.num_layers} layers")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads, {self.num_heads}, is no multiple of num_kv_heads, {self.num_kv_heads}"
            )
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise ValueError("sliding_window must be at least 1, or null for none")
        for name in ("attention_softcap", "logit_softcap"):
            if (cap := getattr(self, name)) is not None and not cap > 0:
                raise ValueError(f"{name} is {cap}, and must be above 0, or null for none")
        if self.attention_scale is not None and not self.attention_scale > 0:
            raise ValueError(f"the factor of its attention scores is {self.attention_scale}")
        if self.experts is not None:
            if not 1 <= self.experts.chosen <= self.experts.count or not 1 <= self.experts.size <= MAX_SIZE:
                raise ValueError(f"{self.experts.chosen} of {self.experts.count} experts cannot be chosen")
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                check_rope(rope, self.head_dim, self.context_len)

    def rope_of(self, layer: int) -> Rope:
        """Return which rotary embedding a layer has."""
        if self.no_rope and self.no_rope[layer]:
            return "none"
        return "local" if self.local_rope is not None and self.sliding_windows[layer] is not None else "main"

    def has_experts(self, layer: int) -> bool:
        """Return True if a layer has experts in place of the MLP."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def fuses(self) -> bool:
        """True if the fused kernels for CUDA compute such layers."""
        return (
            (self.norms, self.norm_offset, self.activation) == ("before", 0.0, "silu")
            and not self.norm_all_heads
            and self.local_rope is None
            and not any(self.no_rope)
            and self.attention_softcap is None
            and self.experts is None
            and self.rope.get("partial_rotary_factor", 1.0) == 1.0
        )


def layer_windows(hf: dict[str, Any], kinds: list[str], default: int | None) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, by its kind.

    Args:
        hf: the config.
        kinds: ``layer_types`` of a config that names none.
        default: size of the window of a config that names none.
    """
    window = hf.get("sliding_window", default)
    kinds = hf.get("layer_types") or kinds
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ModelUnsupported(f"layers of type {kind!s:.40} are not supported for this architecture")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_activation(hf: dict[str, Any], key: str = "hidden_act", default: str = "silu") -> Activation:
    """Return the activation of the MLP's gate.

    Raises:
        ModelUnsupported: it is another one than those that the shared MLP has.
    """
    name = hf.get(key) or default
    if name in ("silu", "swish"):
        return "silu"
    if name in ("gelu_pytorch_tanh", "gelu_new"):
        return "gelu_tanh"
    raise ModelUnsupported(f"{key} {name!r} is not supported for this architecture")
