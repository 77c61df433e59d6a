"""Rotary position embeddings (RoFormer, arXiv:2104.09864) and their scaled variants.

Frequencies follow transformers' ``modeling_rope_utils``, so that checkpoints behave the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ullm.errors import ModelUnsupported

KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kind of scaling → the parameters that it cannot do without."""


def read_rope(hf: dict[str, Any], default_theta: float, *, partial: bool = False) -> dict[str, Any]:
    """Return the rope parameters of a config.json in the new style, from either style, as transformers does.

    Args:
        hf: the config's content.
        default_theta: base of the frequencies where the config names none.
        partial: the architecture may rotate only a part of each head, or by LongRoPE.

    Raises:
        ModelUnsupported: it may not, and does; or the scaling is not native.
        ValueError: the parameters are no object.
    """
    # The older name wins, as Qwen's instructions for long contexts have users add it.
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(f"its rope_scaling or rope_parameters must be an object, is {given!s:.40}")
    rope = dict(given)
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    thetas = (rope.get("rope_theta"), hf.get("rope_theta"), default_theta)
    rope["rope_theta"] = next(theta for theta in thetas if theta is not None)
    original = "original_max_position_embeddings"  # beside the parameters it wins, as Phi-3 has it
    rope[original] = hf.get(original) or rope.get(original) or hf.get("max_position_embeddings")
    if rope["rope_type"] == "dynamic":  # which transformers measures by the model's limit
        rope[original] = hf.get("max_position_embeddings")
    if partial:
        rope.setdefault("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
        rope["max_position_embeddings"] = hf.get("max_position_embeddings")
    elif hf.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelUnsupported("partial rotary embeddings are not supported for this architecture")
    known = {*KINDS} if partial else {*KINDS} - {"longrope"}
    if not isinstance(rope["rope_type"], str) or rope["rope_type"] not in known:
        raise ModelUnsupported(
            f"rope scaling of type {rope['rope_type']!s:.40} is not supported for this architecture"
        )
    return rope


def read_layer_ropes(
    hf: dict[str, Any], default_theta: float, local_theta: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rope parameters of layers with full attention and of those with a sliding window.

    Older configs have the first in ``rope_theta`` and ``rope_scaling`` and the second in
    ``rope_local_base_freq``.

    Args:
        default_theta, local_theta: bases where the config names none.
    """
    given, limit = (
        hf.get("rope_parameters") or {},
        {"max_position_embeddings": hf.get("max_position_embeddings")},
    )
    if not isinstance(given, dict) or (given and not {"full_attention", "sliding_attention"} & given.keys()):
        raise ModelUnsupported(
            "rope_parameters that name no kind of layer are not supported for this architecture"
        )
    main = {**(given.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
    main.setdefault("rope_theta", hf.get("rope_theta", default_theta))
    local = dict(given.get("sliding_attention") or {})
    local.setdefault("rope_theta", hf.get("rope_local_base_freq", local_theta))
    return tuple(read_rope({**limit, "rope_parameters": part}, 0.0) for part in (main, local))  # type: ignore[return-value]


def rotary_size(rope: dict[str, Any], head_dim: int) -> int:
    """Return how many numbers of each head are rotated."""
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def check_rope(rope: dict[str, Any], head_dim: int, positions: int) -> None:
    """Check that the parameters make frequencies.

    Raises:
        ValueError: they do not; names the parameter that is missing or of another type.
    """
    kind = rope["rope_type"]
    for name in ("rope_theta", *KINDS[kind]):
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(
                f"its rotary scaling {kind!r} needs a number above 0 as {name!r}, has {value!s:.40}"
            )
    try:
        frequencies, factor = _frequencies(rope, head_dim, positions)
        usable = bool(frequencies.isfinite().all()) and math.isfinite(factor)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its rotary scaling {kind!r} cannot be computed: {error}") from None
    if not usable:
        raise ValueError(f"its rotary scaling {kind!r} makes frequencies that are no numbers")


def cache_bytes(rope: dict[str, Any], head_dim: int, positions: int) -> int:
    """Return the bytes that `rope_cache` takes at most, while it computes."""
    return 5 * 4 * positions * rotary_size(rope, head_dim)  # two tables, and what they are made of


def rope_cache(rope: dict[str, Any], head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each ``[positions, 1, rotary_size]`` float32, for `rotate`.

    The first half of the sines is negated, so that rotate-half becomes a roll:
    ``x * cos + roll(x) * sin``.

    Raises:
        ModelUnsupported: the ``rope_type`` is unknown.
    """
    frequencies, factor = _frequencies(rope, head_dim, positions)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x [T, heads, head_dim]`` rotated by ``cos``, ``sin`` ``[T, 1, rotary]`` of `rope_cache`.

    Where ``rotary`` is smaller, the rest of each head stays as it is.
    """
    rotary = cos.shape[-1]
    if rotary < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotary], cos, sin), x[..., rotary:]), -1)
    return x.roll(x.shape[-1] // 2, -1).mul_(sin).addcmul_(x, cos)


def _frequencies(rope: dict[str, Any], head_dim: int, positions: int) -> tuple[Tensor, float]:
    kind, theta, head_dim = rope["rope_type"], rope["rope_theta"], rotary_size(rope, head_dim)
    if kind == "dynamic":
        theta *= _dynamic_stretch(rope, head_dim, positions)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (theta**exponents)
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return plain / rope["factor"], 1.0
    if kind == "longrope":
        return _longrope(rope, plain), _longrope_attention_factor(rope)
    if kind == "llama3":
        return _llama3(rope, plain), 1.0
    if kind == "yarn":
        return _yarn(rope, plain, head_dim), _yarn_attention_factor(rope)
    raise ModelUnsupported(f"rope scaling of type {kind!r} is not supported for this architecture")


def _dynamic_stretch(rope: dict[str, Any], head_dim: int, positions: int) -> float:
    """Return the factor of theta in dynamic NTK scaling, for texts of up to ``positions`` tokens.

    It would depend on each text's length, and keys are cached as they were rotated first. So beyond the
    original context all texts get the scaling of the longest one, as in vLLM.
    """
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    stretch = float(factor * max(positions, length) / length - (factor - 1))
    return math.pow(stretch, head_dim / (head_dim - 2))


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


def _longrope(rope: dict[str, Any], plain: Tensor) -> Tensor:
    """Scale as LongRoPE does within the original context, arXiv:2402.13753: each frequency by its factor."""
    factors = torch.tensor(rope["short_factor"], dtype=torch.float32)
    if factors.shape != plain.shape:
        raise ValueError(f"it has {len(factors)} short factors for {len(plain)} frequencies")
    return plain / factors


def _longrope_attention_factor(rope: dict[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor")
    if factor is None:  # as in Phi-3, whose config has the extended context beside the original one
        factor = rope["max_position_embeddings"] / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    weight, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return mscale(weight) / mscale(all_dim) if weight and all_dim else mscale(1)
