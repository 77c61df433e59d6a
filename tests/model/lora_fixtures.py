"""LoRA adapters as peft saves them, made by hand, and the same merged into transformers' model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ullm.hub.adapters import digest
from ullm.protocol.messages import Adapter

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
}


def matrices(model: Any, targets: tuple[str, ...], rank: int, seed: int) -> dict[str, Tensor]:
    """Random A and B of the linear layers whose names end with one of ``targets``."""
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(targets):
            prefix = f"base_model.model.{name}"
            a = torch.randn(rank, module.in_features, generator=generator) * 0.2
            b = torch.randn(module.out_features, rank, generator=generator) * 0.2
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    return tensors


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def adapter(folder: Path, number: int = 1) -> Adapter:
    return Adapter(folder.name, str(folder), digest(folder), number)


@torch.no_grad()
def merged(model: Any, tensors: dict[str, Tensor], scale: float = 2.0) -> Any:
    """A copy of the model with ``scale * B A`` added to its weights, as peft's ``merge_and_unload`` does."""
    model = copy.deepcopy(model)
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(name).weight += scale * tensors[key.replace("lora_A", "lora_B")] @ a
    return model
