"""Adapters of layers that are split over ranks: the parts are those of the whole layer."""

from __future__ import annotations

import torch

from ullm.model.layers.linear import ColumnParallelLinear, ParallelLinear, RowParallelLinear
from ullm.model.layers.linear_kernels import PlainKernel
from ullm.model.layers.lora import LoraHost, LoraLayer
from ullm.model.layers.parallel import ParallelContext

IN, RANK = 32, 3
OUTS = {"q_proj": 24, "k_proj": 8}


def adapted(module: ParallelLinear, weights: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> ParallelLinear:
    """The module with a base of zeros and one adapter, for all rows but the first."""
    assert module.weight is not None
    module.weight.data.zero_()  # type: ignore[union-attr]
    kernel = PlainKernel()
    module.pack(kernel)
    module.bind(kernel)
    host = LoraHost(kernel, torch.float32, torch.device("cpu"), groups=[(7, slice(1, 5))])
    module.lora = LoraLayer(host)
    host.places.update(module.lora_places("layer.qkv_proj", module.lora))
    for name, (a, b) in weights.items():
        host.attach(7, f"layer.{name}", a, b, 0.5)
    return module


def test_outputs_split_over_ranks() -> None:
    x = torch.randn(5, IN)
    weights = {name: (torch.randn(RANK, IN), torch.randn(size, RANK)) for name, size in OUTS.items()}
    expected = {name: 0.5 * x @ a.T @ b.T for name, (a, b) in weights.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in OUTS}
    for rank in range(2):
        runs = {name: ((rank * size // 2, size // 2),) for name, size in OUTS.items()}
        module = ColumnParallelLinear(IN, {name: (OUTS[name], runs[name]) for name in OUTS}, bias=False)
        out = adapted(module, weights).forward(x)
        found["q_proj"].append(out[:, :12])
        found["k_proj"].append(out[:, 12:])
    for name, parts in found.items():
        whole = torch.cat(parts, 1)
        torch.testing.assert_close(whole[1:], expected[name][1:])
        assert not whole[0].any()


def test_inputs_split_over_ranks() -> None:
    x = torch.randn(5, IN)
    a, b = torch.randn(RANK, IN), torch.randn(10, RANK)
    total = torch.zeros(5, 10)
    for rank in range(2):
        own = ((rank * 16, 16),)
        module = RowParallelLinear(IN, 10, False, ParallelContext(rank, 2), own)
        assert module.weight is not None
        module.weight.data.zero_()  # type: ignore[union-attr]
        module.pack(PlainKernel())
        module.bind(PlainKernel())
        host = LoraHost(PlainKernel(), torch.float32, torch.device("cpu"))
        host.groups = [(1, torch.tensor([0, 2, 4]))]
        module.lora = LoraLayer(host)
        host.places.update(module.lora_places("o_proj", module.lora))
        host.attach(1, "o_proj", a, b, 2.0)
        total += module.product(x[:, rank * 16 : rank * 16 + 16].contiguous())
    expected = 2.0 * x @ a.T @ b.T
    torch.testing.assert_close(total[[0, 2, 4]], expected[[0, 2, 4]])
    assert not total[[1, 3]].any()
