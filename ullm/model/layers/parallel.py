"""The ranks of a replica and their collective operations.

ullm keeps no global state: code that needs the ranks gets a `ParallelContext`. With one rank there is no
process group at all, so several engines can run in one process.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ullm.errors import ModelUnsupported
from ullm.protocol.messages import RankSpec

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

RENDEZVOUS_TIMEOUT = 300.0
"""Seconds that ranks wait for each other; a collective that takes longer raises an error."""


@dataclass(frozen=True)
class ParallelContext:
    """The tensor-parallel group of this rank.

    Args:
        rank: this rank, from 0.
        world_size: number of ranks that share each layer.
        group: the process group; None with one rank.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks; ``x`` is overwritten."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def gather_last(self, x: Tensor) -> Tensor:
        """Return ``[rows, n]`` of all ranks side by side, ``[rows, n * world_size]``, on every rank."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def agree_least(self, value: int, device: torch.device) -> int:
        """Return the least of the ranks' values, so that all use the same one."""
        if self.group is None:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self.group)
        return int(box.item())

    def share(self, total: int, what: str) -> int:
        """Return this rank's share of ``total``.

        Args:
            what: name of the things that are shared, for the error.

        Raises:
            ModelUnsupported: ``total`` is not divisible by the number of ranks.
        """
        if total % self.world_size:
            raise ModelUnsupported(
                f"the model's {total} {what} cannot be split over --tp-size {self.world_size}; "
                "use a size that divides them"
            )
        return total // self.world_size

    def close(self) -> None:
        """Leave the process group. NCCL's is aborted, since a dead peer would keep it waiting."""
        if self.group is None or not dist.is_initialized():
            return
        if dist.get_backend(self.group) == "nccl":
            dist.distributed_c10d._abort_process_group(self.group)
        else:
            dist.destroy_process_group(self.group)


def open_parallel(rank: RankSpec, device: torch.device) -> ParallelContext:
    """Connect to the replica's other ranks at ``rank.rendezvous``; return at once if there are none."""
    if rank.world_size == 1:
        return ParallelContext()
    stay_on_loopback()
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=rendezvous_store(rank),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT),
        device_id=device if device.type == "cuda" else None,
    )
    return ParallelContext(rank.rank, rank.world_size, dist.group.WORLD)


def rendezvous_store(rank: RankSpec) -> TCPStore:
    """Return where the ranks meet; rank 0 listens there, on that address only.

    PyTorch would listen on all addresses, and whoever connects could take a rank's place.
    """
    from torch._C._distributed_c10d import TCPStore  # `torch.distributed` has it without a type

    host, _, port = rank.rendezvous.rpartition(":")
    options: dict[str, Any] = {"timeout": timedelta(seconds=RENDEZVOUS_TIMEOUT)}
    if rank.rank == 0:
        listener = socket.create_server((host, int(port)))
        options["master_listen_fd"] = listener.detach()  # the store closes it
    return TCPStore(host, int(port), rank.world_size, rank.rank == 0, **options)


def stay_on_loopback() -> None:
    """Have Gloo and NCCL connect the ranks, all on one machine, over loopback, unless told otherwise."""
    names = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    for loopback in {"lo", "lo0"}.intersection(names):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
