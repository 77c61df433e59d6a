"""Rotary position embeddings (RoFormer, arXiv:2104.09864) and their scaled variants.

Frequencies follow transformers' ``modeling_rope_utils``, so that checkpoints behave the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ullm.errors import ModelUnsupported


def read_rope(hf: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """Return the rope parameters of a config.json in the new style, from either style.

    Args:
        hf: the config's content.
        default_theta: base of the frequencies where the config names none.

    Raises:
        ModelUnsupported: only a part of each head is rotated.
    """
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or hf.get("rope_theta") or default_theta
    limit = hf.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
    rope.setdefault("original_max_position_embeddings", limit)
    if hf.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelUnsupported("partial rotary embeddings are not supported for this architecture")
    return rope


def rope_cache(rope: dict[str, Any], head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each ``[positions, 1, head_dim]`` float32, for `rotate`.

    The first half of the sines is negated, so that rotate-half becomes a roll:
    ``x * cos + roll(x) * sin``.

    Raises:
        ModelUnsupported: the ``rope_type`` is unknown.
    """
    frequencies, factor = _frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x [T, heads, head_dim]`` rotated by ``cos``, ``sin`` ``[T, 1, head_dim]`` of `rope_cache`."""
    return x.roll(x.shape[-1] // 2, -1).mul_(sin).addcmul_(x, cos)


def _frequencies(rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    kind = rope["rope_type"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope["rope_theta"] ** exponents)
    # Dynamic NTK only scales beyond max_position_embeddings, and no sequence gets longer than that.
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return plain / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(rope, plain), 1.0
    if kind == "yarn":
        return _yarn(rope, plain, head_dim), _yarn_attention_factor(rope)
    raise ModelUnsupported(f"rope scaling of type {kind!r} is not supported for this architecture")


def _llama3(rope: dict[str, Any], plain: Tensor) -> Tensor:
    """Scale as Llama 3.1 does: keep high frequencies, divide low ones, blend between them."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    smooth: Tensor = ((length / wavelength - low) / (high - low)).clamp(0, 1)
    factor = float(rope["factor"])
    return (1 - smooth) * plain / factor + smooth * plain


def _yarn(rope: dict[str, Any], plain: Tensor, head_dim: int) -> Tensor:
    """Scale as YaRN does, arXiv:2309.00071, section 3.2: interpolate the low frequencies only."""
    theta, length = rope["rope_theta"], rope["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return float(head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta)))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep: Tensor = 1 - ramp.clamp(0, 1)
    return plain / float(rope["factor"]) * (1 - keep) + plain * keep


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    weight, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return mscale(weight) / mscale(all_dim) if weight and all_dim else mscale(1)
