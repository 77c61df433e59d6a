"""The MLP of a decoder layer."""

from __future__ import annotations

from torch import Tensor, nn

from ullm.model.architectures.decoder_config import DecoderConfig
from ullm.model.layers.layer_ops import StepOps
from ullm.model.layers.linear import ColumnParallelLinear, FusedColumnParallelLinear, RowParallelLinear
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.split import share_units


class GatedMLP(nn.Module):
    """The MLP ``down(activation(gate(x)) * up(x))``.

    Args:
        size: number of hidden units, of all ranks; None: the config's.
    """

    def __init__(self, config: DecoderConfig, parallel: ParallelContext, size: int | None = None) -> None:
        super().__init__()
        total, hidden, bias = size or config.intermediate_size, config.hidden_size, config.mlp_bias
        own = (share_units(total, parallel.world_size, parallel.rank),)
        kind = FusedColumnParallelLinear if config.fused else ColumnParallelLinear
        self.activation = config.activation
        self.gate_up_proj = kind(hidden, {"gate_proj": (total, own), "up_proj": (total, own)}, bias)
        self.down_proj = RowParallelLinear(total, hidden, bias, parallel, own)

    def forward(self, x: Tensor, step: StepOps) -> Tensor:
        """Compute ``[T, hidden_size]`` → ``[T, hidden_size]``."""
        return self.down_proj.forward(self.hidden(x, step))

    def part(self, x: Tensor, step: StepOps) -> Tensor:
        """Compute this rank's part of the sum."""
        return self.down_proj.part(self.hidden(x, step))

    def hidden(self, x: Tensor, step: StepOps) -> Tensor:
        """Compute the hidden units of this rank."""
        return step.gate_and_mul(self.gate_up_proj.forward(x), self.activation)
