"""The ranks of a replica and what they say to each other.

A rank is a place in a grid: ``stage`` says which layers it has, ``rank`` which part of each of them. Ranks of
one stage sum and gather (tensor parallelism); a stage sends its hidden states to the next one (pipeline
parallelism). The first rank of the last stage chooses the tokens and tells all others.

ullm keeps no global state: code that needs the ranks gets a `ParallelContext`. With one rank there is no
process group at all, so several engines can run in one process.

Distributed state is made in this order, and given back in the reverse one: the store where the ranks meet;
the group of all ranks; with several stages, a group per stage, and the group that tokens are sent in. Ranks
that do not meet give up after `RENDEZVOUS_TIMEOUT`, an operation after the same time, and groups are given
`CLOSE_SECONDS` to be destroyed.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ullm.errors import ResourceUnavailable
from ullm.logs import get_logger
from ullm.protocol.messages import RankSpec

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

log = get_logger(__name__)

RENDEZVOUS_TIMEOUT = 300.0
"""Seconds that ranks wait for each other; a collective that takes longer raises an error."""
CLOSE_SECONDS = 5.0
"""Seconds until groups that cannot be destroyed are left to the end of the process."""


class Exchange(Protocol):
    """Collectives within a stage that are faster than those of the process group."""

    @property
    def path(self) -> str:
        """How the other ranks join the one of the first rank, until `forget_path`."""

    def forget_path(self) -> None:
        """Note that all have joined."""

    def all_reduce(self, x: Tensor) -> None:
        """Add up contiguous float32 over the ranks, in place."""

    def gather(self, x: Tensor) -> Tensor:
        """Return the ranks' tensors of equal shape and dtype, ``[ranks, *shape]``."""


@dataclass(frozen=True)
class Groups:
    """The process groups of a connected rank.

    Args:
        store: where the ranks have met.
        everyone: all ranks of the replica.
        stage: the ranks of this rank's stage; None if it is alone there.
        tokens: all ranks again, for tokens on their way while hidden states go another one.
    """

    store: TCPStore
    everyone: Any
    stage: Any
    tokens: Any


class ParallelContext:
    """The place of this rank, and its connections, if it has any.

    A rank that is not connected computes alone: sums are its own, and what it would receive is zeros. A
    standby worker prepares its part of a model that way; `connect` follows when it is needed.

    Args:
        rank: which part of each layer this rank has, from 0.
        world_size: number of ranks that share each layer.
        stage: which layers it has, from 0.
        num_stages: number of stages.

    Attributes:
        exchange: sums and gathers within the stage, instead of its process group.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, stage: int = 0, num_stages: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.stage, self.num_stages = stage, num_stages
        self.exchange: Exchange | None = None
        self._groups: Groups | None = None
        self._sending: deque[tuple[Any, Tensor]] = deque()

    @classmethod
    def of(cls, spec: RankSpec) -> ParallelContext:
        """Return the place of a worker."""
        size = spec.world_size // spec.num_stages
        return cls(spec.rank % size, size, spec.rank // size, spec.num_stages)

    @property
    def total(self) -> int:
        """Ranks of the replica."""
        return self.world_size * self.num_stages

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head."""
        return self.stage == self.num_stages - 1

    @property
    def chooses(self) -> bool:
        """Whether this rank chooses the tokens."""
        return self.is_last_stage and self.rank == 0

    # --- within a stage ----------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks of a stage; ``x`` is overwritten."""
        if self._groups is None or self._groups.stage is None:
            return x
        if self.exchange is None:
            dist.all_reduce(x, group=self._groups.stage)
            return x
        total = x.float().contiguous()
        self.exchange.all_reduce(total)
        return total.to(x.dtype)

    def gather_last(self, x: Tensor) -> Tensor:
        """Return ``[rows, n]`` of the ranks of a stage side by side, on each of them.

        A rank that is not connected returns ``x`` as often.
        """
        if self.world_size == 1:
            return x
        if self._groups is None:
            return torch.cat([x] * self.world_size, dim=-1)
        if self.exchange is not None:
            return torch.cat(self.exchange.gather(x).unbind(), dim=-1)
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous(), group=self._groups.stage)
        return torch.cat(parts, dim=-1)

    # --- between stages ----------------------------------------------------------------------------

    def send(self, hidden: Tensor) -> None:
        """Send hidden states to the next stage; do not wait until it takes them."""
        if self._groups is None:
            return
        while len(self._sending) >= self.num_stages:  # as many steps are on their way at most
            self._sending.popleft()[0].wait()
        to = self.rank + (self.stage + 1) * self.world_size
        self._sending.append((dist.isend(hidden, to), hidden))

    def receive(self, hidden: Tensor) -> Tensor:
        """Fill ``hidden`` with what the stage before sends."""
        if self._groups is None:
            return hidden.zero_()
        dist.recv(hidden, self.rank + (self.stage - 1) * self.world_size)
        return hidden

    # --- all ranks ---------------------------------------------------------------------------------

    def start_sharing(self, tokens: Tensor) -> Any:
        """Start sending chosen tokens to all ranks; on those that do not choose, ``tokens`` is filled.

        Returns:
            The operation, to be waited for; None if there is nobody to share with.
        """
        if self._groups is None:
            return None
        if self.exchange is not None and self.num_stages == 1:
            tokens.copy_(self.exchange.gather(tokens)[0])
            return None
        first = (self.num_stages - 1) * self.world_size
        return dist.broadcast(tokens, first, group=self._groups.tokens, async_op=True)

    def agree_least(self, value: int, device: torch.device) -> int:
        """Return the least of all ranks' values, so that all use the same one."""
        if self._groups is None:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self._groups.everyone)
        return int(box.item())

    # --- life --------------------------------------------------------------------------------------

    def connect(
        self, spec: RankSpec, device: torch.device, announce: Callable[[str], None] = lambda _: None
    ) -> None:
        """Connect to the replica's other ranks at ``spec.rendezvous``; return at once if there are none.

        Args:
            announce: called by rank 0 with the address where it waits for the others.

        Raises:
            ConfigError: the address is taken.
            RuntimeError: the others did not come.
        """
        if self.total == 1:
            return
        stay_on_loopback()
        store = rendezvous_store(spec, announce)
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=spec.rank,
            world_size=spec.world_size,
            timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT),
            device_id=device if device.type == "cuda" else None,
        )
        everyone = dist.group.WORLD
        if self.num_stages == 1:
            self._groups = Groups(store, everyone, everyone, everyone)
            return
        timeout, size = timedelta(seconds=RENDEZVOUS_TIMEOUT), self.world_size
        stages = [
            dist.new_group(list(range(size * stage, size * (stage + 1))), timeout=timeout)
            for stage in range(self.num_stages if size > 1 else 0)  # every rank takes part in every one
        ]
        tokens = dist.new_group(list(range(self.total)), timeout=timeout)
        self._groups = Groups(store, everyone, stages[self.stage] if stages else None, tokens)

    def use_exchange(self, make: Callable[[str | None], Exchange]) -> None:
        """Use faster collectives within the stage, if all ranks of the replica can.

        Args:
            make: returns this rank's end, or raises OSError; called with None on the first rank of the stage,
                and with what is that one's `Exchange.path` on the others.
        """
        if self._groups is None or self.world_size == 1:
            return
        name, exchange = f"exchange{self.stage}", None
        try:
            if self.rank == 0:
                exchange = make(None)
                self._groups.store.set(name, exchange.path)
            else:
                path = self._groups.store.get(name).decode()
                exchange = make(path) if path else None
        except OSError as error:
            log.info("ranks exchange through sockets", reason=str(error))
            if self.rank == 0:
                self._groups.store.set(name, "")
        agreed = self.agree_least(int(exchange is not None), torch.device("cpu"))
        if exchange is not None:
            exchange.forget_path()
        self.exchange = exchange if agreed else None

    def close(self) -> None:
        """Leave the process groups. NCCL's are aborted, since a dead peer would keep them waiting.

        Gloo's may wait for a peer that hangs; they are left alone after `CLOSE_SECONDS`.
        """
        if self._groups is None or not dist.is_initialized():
            return
        self._groups = self.exchange = None
        self._sending.clear()
        thread = threading.Thread(target=_destroy_groups, name="close-groups", daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            log.warning("process groups are not destroyed, a peer may hang", seconds=CLOSE_SECONDS)


def _destroy_groups() -> None:
    """Destroy the last group first, and with the group of all ranks the store."""
    if dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def open_parallel(
    spec: RankSpec, device: torch.device, announce: Callable[[str], None] = lambda _: None
) -> ParallelContext:
    """Return a rank that is connected to the replica's others; see `ParallelContext.connect`."""
    parallel = ParallelContext.of(spec)
    parallel.connect(spec, device, announce)
    return parallel


def rendezvous_store(spec: RankSpec, announce: Callable[[str], None] = lambda _: None) -> TCPStore:
    """Return where the ranks meet; rank 0 listens there, on that address only.

    PyTorch would listen on all addresses, and whoever connects could take a rank's place.

    Args:
        announce: called by rank 0 with its address; with port 0, the operating system has chosen a free one.

    Raises:
        ConfigError: the address is taken.
    """
    from torch._C._distributed_c10d import TCPStore  # `torch.distributed` has it without a type

    host, _, port = spec.rendezvous.rpartition(":")
    options: dict[str, Any] = {"timeout": timedelta(seconds=RENDEZVOUS_TIMEOUT)}
    if spec.rank > 0:
        return TCPStore(host, int(port), spec.world_size, False, **options)
    try:
        listener = socket.create_server((host, int(port)))
    except OSError as error:
        raise ResourceUnavailable(
            f"--nccl-port: the ranks cannot meet at {spec.rendezvous}: {error.strerror or error}; leave the "
            "option out, and the system chooses a free port"
        ) from None
    with closing(listener):
        chosen = listener.getsockname()[1]
        # Waiting for the others here would keep rank 0 from telling them where it is.
        options |= {"master_listen_fd": listener.detach(), "wait_for_workers": False}
        store = TCPStore(host, chosen, spec.world_size, True, **options)  # which closes the listener
    announce(f"{host}:{chosen}")
    return store


def stay_on_loopback() -> None:
    """Have Gloo and NCCL connect the ranks, all on one machine, over loopback, unless told otherwise."""
    names = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    for loopback in {"lo", "lo0"}.intersection(names):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
