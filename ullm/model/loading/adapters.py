"""Read a LoRA adapter as peft saves it: what its config asks for, and its matrices.

Whatever changes the result and cannot be computed here is refused by name. The remedy is always the same:
merge the adapter into the model (peft's ``merge_and_unload``) and serve the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ullm.errors import ModelFileBroken, ModelUnsupported
from ullm.hub.adapters import CONFIG, WEIGHTS, digest
from ullm.hub.files import read_json

REMEDY = "merge the adapter into the model with peft's merge_and_unload, and serve that"
WITHOUT_EFFECT = frozenset(
    {
        # Where the adapter comes from, and how it was trained.
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"),
        *("peft_type", "peft_version", "lora_dropout", "ensure_weight_tying", "runtime_config"),
        *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "megatron_core", "megatron_config"),
        "qalora_group_size",  # of use_qalora, which is refused
        # Which layers it has, which its tensors say.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        # Read here.
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"),
    }
)
"""Keys of an adapter_config.json that need not be refused."""
HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""
MATCH_SECONDS = 1.0
"""For which a pattern is matched with a layer's name; the ``re`` module could not be stopped."""
_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter's config says of its matrices; the names are peft's."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank(self, name: str) -> int:
        """Return the rank in a layer."""
        return int(_by_pattern(self.rank_pattern, name, self.r))

    def scale(self, name: str) -> float:
        """Return the factor of a layer's product: alpha / r, or alpha / sqrt(r) (arXiv:2312.03732)."""
        rank = self.rank(name)
        alpha = float(_by_pattern(self.alpha_pattern, name, self.lora_alpha))
        return alpha / (rank**0.5 if self.use_rslora else rank)


def _by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that a layer's name ends with, as peft matches them.

    Raises:
        TimeoutError: a pattern takes too long, as some do that repeat what repeats.
    """
    for key, value in pattern.items():
        if regex.match(rf"(.*\.)?({key})$", name, timeout=MATCH_SECONDS):
            return value
    return default


def read_lora_config(folder: Path) -> LoraConfig:
    """Read an adapter's config.

    Raises:
        ModelFileBroken: it is not a JSON object, or a value is of another type.
        ModelUnsupported: it asks for something that is not computed here; names the key.
    """
    file = folder / CONFIG
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ModelUnsupported(f"{file}: peft_type is {config.get('peft_type')!r}, only LORA is supported")
    if config.get("bias") not in (None, "none"):
        raise ModelUnsupported(f"{file}: bias {config['bias']!r} is not supported; {REMEDY}")
    if config.get("init_lora_weights") not in HARMLESS_INITS:
        init = config["init_lora_weights"]
        raise ModelUnsupported(f"{file}: init_lora_weights {init!r} changes the base model; {REMEDY}")
    for key in sorted(config.keys() - WITHOUT_EFFECT):
        if config[key]:
            raise ModelUnsupported(f"{file}: {key} {config[key]!s:.60} is not supported; {REMEDY}")
    values = {key: config.get(key) for key in ("r", "lora_alpha")}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 20:
            raise ModelFileBroken(file, f"{key!r} must be a number above 0, is {value!s:.40}")
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict) or not all(
            isinstance(value, int | float) and value > 0 for value in pattern.values()
        ):
            raise ModelFileBroken(file, f"{key!r} must map names to numbers above 0")
        for expression in pattern:
            try:
                regex.compile(rf"(.*\.)?({expression})$")
            except regex.error as error:
                raise ModelFileBroken(file, f"{key!r} has {expression!r:.60}: {error}") from None
    return LoraConfig(
        r=int(config["r"]),
        lora_alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
    )


@dataclass(frozen=True)
class LoraPart:
    """An adapter's matrices of one layer: ``a [rank, in]``, ``b [out, rank]``, and the product's factor."""

    name: str
    a: Tensor
    b: Tensor
    scale: float


def read_lora(folder: Path, expected: str) -> Iterator[LoraPart]:
    """Read an adapter, layer by layer.

    Args:
        expected: the digest of its files.

    Raises:
        ModelFileBroken: a file is damaged, or has changed, or matrices do not fit together; names the tensor.
        ModelUnsupported: a tensor is no LoRA of a linear layer; names it, and what it is.
    """
    if digest(folder) != expected:
        raise ModelFileBroken(folder, "the adapter's files have changed since it was loaded; load it again")
    config, file = read_lora_config(folder), folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as tensors:
            names = _pairs(file, list(tensors.keys()))
            if not names:
                raise ModelFileBroken(file, "has no LoRA matrices")
            for name, keys in names.items():
                a, b = (tensors.get_tensor(keys[part]) for part in "AB")
                yield LoraPart(name, *_checked(file, config, name, a, b), config.scale(name))
    except TimeoutError:  # before OSError, of which it is one
        detail = "a pattern of its rank_pattern or alpha_pattern takes too long to match; simplify it"
        raise ModelFileBroken(folder / CONFIG, detail) from None
    except (SafetensorError, OSError) as error:
        raise ModelFileBroken(file, f"is not a complete safetensors file: {error}") from None


def _pairs(file: Path, keys: list[str]) -> dict[str, dict[str, str]]:
    """Return the name of each layer → ``A`` and ``B`` → the tensor's key."""
    names: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        match = _KEY.fullmatch(key)
        if match is None:
            raise ModelUnsupported(f"{file}: tensor {key!r} {_kind(key)}; {REMEDY}")
        names.setdefault(match["name"], {})[match["part"]] = key
    for name, found in names.items():
        if len(found) < 2:
            missing = "B" if "A" in found else "A"
            raise ModelFileBroken(file, f"has no lora_{missing} for {name!r}")
    return names


def _kind(key: str) -> str:
    """Say why a tensor is refused."""
    if "lora_embedding" in key:
        return "adapts an embedding, which is not supported"
    if "magnitude_vector" in key:
        return "is of DoRA, which is not supported"
    if key.endswith(".bias"):
        return "is a bias, which is not supported in adapters"
    if "lora_" not in key:
        return "is a whole tensor of the model (modules_to_save), which is not supported in adapters"
    return "is of a kind that is not known"


def _checked(file: Path, config: LoraConfig, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2:
        raise ModelUnsupported(f"{file}: the adapter of {name!r} is of no linear layer; {REMEDY}")
    if not a.is_floating_point() or not b.is_floating_point():
        raise ModelUnsupported(f"{file}: the adapter of {name!r} is in {a.dtype}; save it in a float dtype")
    if a.shape[0] != b.shape[1]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ModelFileBroken(file, f"lora_A and lora_B of {name!r} have the shapes {shapes}")
    if a.shape[0] != config.rank(name):
        detail = f"{name!r} has rank {a.shape[0]}, its config says {config.rank(name)}"
        raise ModelFileBroken(file, detail)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModelFileBroken(file, f"the adapter of {name!r} has values that are not finite")
    return a, b
