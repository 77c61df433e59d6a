"""Mixtures of experts (arXiv:1701.06538): each token takes the MLPs that a router chooses for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ullm.model.architectures.decoder_config import DecoderConfig, ExpertsConfig
from ullm.model.architectures.mlp import GatedMLP
from ullm.model.layers.layer_ops import StepOps
from ullm.model.layers.linear import Loadable, Shard, Shards, empty
from ullm.model.layers.parallel import ParallelContext


class Router(Loadable):
    """A small linear layer without bias; replicated on all ranks and computed in float32."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = empty(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``[T, in]`` → ``[T, out]`` in float32."""
        return F.linear(x.float(), self.weight.float())

    def shards(self, name: str) -> Shards:
        """Return the whole weight."""
        yield f"{name}.weight", Shard(self.weight, tuple(self.weight.shape))


class Experts(nn.Module):
    """The MLP of a layer with experts. Each rank has its share of the hidden units of every expert."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig, parallel: ParallelContext) -> None:
        super().__init__()
        hidden, self.settings, self.parallel = config.hidden_size, experts, parallel
        self.gate = Router(hidden, experts.count)
        self.experts = nn.ModuleList(GatedMLP(config, parallel, experts.size) for _ in range(experts.count))
        shared = experts.shared_size
        self.shared_expert = GatedMLP(config, parallel, shared) if shared else None
        self.shared_expert_gate = Router(hidden, 1) if shared else None

    def forward(self, x: Tensor, step: StepOps) -> Tensor:
        """Compute ``[T, hidden_size]`` → ``[T, hidden_size]``."""
        weights, chosen = self.route(x)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for index in torch.unique(chosen).tolist():
            rows, places = torch.where(chosen == index)
            expert = self.experts[index]
            assert isinstance(expert, GatedMLP)
            out.index_add_(0, rows, expert.part(x[rows], step).float() * weights[rows, places, None])
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out += self.shared_expert.part(x, step).float() * self.shared_expert_gate.forward(x).sigmoid()
        return self.parallel.all_reduce(out)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and indices of the chosen experts, each ``[T, chosen]``."""
        scores = torch.softmax(self.gate.forward(x), -1)
        weights, chosen = scores.topk(self.settings.chosen, -1)
        if self.settings.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen
