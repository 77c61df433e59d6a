"""Random weights, for measurements without a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from ullm.model.layers.linear import RMSNorm
from ullm.model.layers.quantization import QuantizedWeight

DUMMY_SCALE = 0.02
"""Standard deviation of random weights, as in GPT-2's initialisation."""


@torch.no_grad()
def fill_dummy(model: nn.Module, seed: int = 0) -> None:
    """Fill the parameters with random weights, and norms with 1."""
    generators: dict[torch.device, torch.Generator] = {}
    norms = {
        id(module.weight): 1 - module.offset for module in model.modules() if isinstance(module, RMSNorm)
    }
    for parameter in model.parameters():
        if id(parameter) in norms:
            parameter.fill_(norms[id(parameter)])
            continue
        generator = generators.setdefault(
            parameter.device, torch.Generator(parameter.device).manual_seed(seed)
        )
        parameter.normal_(0.0, DUMMY_SCALE, generator=generator)
    for number, module in enumerate(model.modules()):
        if isinstance(weight := getattr(module, "weight", None), QuantizedWeight):
            random = torch.Generator().manual_seed(seed + number)
            weight.copy_(torch.empty(weight.shape).normal_(0.0, DUMMY_SCALE, generator=random))
