"""A sleeping rank: the memory that it frees at each level, and how it wakes.

On a GPU level 1 moves the weights to host memory. On a CPU they are there already, so only the KV pool is
freed. Level 2 drops the weights, and a wake loads them as a start does. Process groups stay open. The ranks
of a replica sleep and wake together, because waking is partly collective.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import torch

from ullm.logs import get_logger
from ullm.machine import available_memory
from ullm.model.attention.batch import AttentionBackend, CausalModel
from ullm.model.execution.graphs import DecodeGraphs
from ullm.model.execution.rank import (
    Rank,
    attach_kv_pool,
    read_model,
    reporting_out_of_memory,
    throttled_progress,
)
from ullm.model.memory.device_memory import MemoryMeter, held_bytes
from ullm.model.memory.host_copy import HostCopy
from ullm.model.memory.kv_pool import mib
from ullm.protocol.messages import Progress

log = get_logger(__name__)


class SleepingRank:
    """Owns all that a rank held, and frees it piece by piece.

    Args:
        rank: the rank to take over; it must not be used afterwards.
    """

    def __init__(self, rank: Rank) -> None:
        self.context, self._info = rank.context, rank.info
        self._graphs: DecodeGraphs | None = rank.graphs
        self._backend: AttentionBackend | None = rank.backend
        self._model: CausalModel | None = rank.model
        self._host: HostCopy | None = None
        self._held: int | None = None
        del rank.graphs, rank.last_tokens, rank.backend, rank.model  # so that nothing else refers to them

    def sleep(self, level: int) -> dict[str, int]:
        """See `ullm.protocol.runner.Runner.sleep`."""
        if self._held is None:
            self._held = held_bytes(self.context.device)
        meter = MemoryMeter(self.context.device)
        if self._graphs is not None:
            meter.release("graphs", self.drop_graphs, nominal=0)
        if self._backend is not None:
            meter.release("kv_cache", self.drop_pool, nominal=self._pool_bytes)
        if level > 1 and self._model is not None:
            on_device = self._host is None
            meter.release("weights", self.drop_weights, nominal=on_device * self._info.weight_bytes)
        elif level == 1 and self.context.device.type != "cpu":
            meter.release("weights", self.park_weights, nominal=self._info.weight_bytes)
        return meter.freed_bytes

    def wake(self, progress: Callable[[Progress], None]) -> Rank:
        """Return a rank like the one before, with an empty KV pool.

        Raises:
            ModelError: the weights can no longer be loaded, or do not fit into memory.
        """
        with reporting_out_of_memory(self.context.device):
            num_blocks = self._info.num_blocks if self._still_fits() else None
            if self._model is None:
                self._model = read_model(self.context, progress)
            elif self._host is not None:
                self._host.restore(throttled_progress("load", progress))
                self._host = None
            return attach_kv_pool(self.context, self._model, num_blocks, progress)

    def drop_graphs(self) -> None:
        """Free the captured graphs."""
        if self._graphs is not None:
            self._graphs.release()
            self._graphs = None

    def drop_pool(self) -> None:
        """Free the KV pool."""
        if self._backend is not None:
            self._backend.release()
            self._backend = None

    def drop_weights(self) -> None:
        """Free the weights, on the device and on the host."""
        self._host = None
        if self._model is None:
            return
        model = weakref.ref(self._model)
        self._model = None
        if model() is not None:  # transformers' models have reference cycles
            gc.collect()

    def park_weights(self) -> None:
        """Move the weights to host memory; drop them if they do not fit there, so that a wake loads them."""
        # All ranks do this at the same time, most likely on the same machine.
        need, free = self._info.weight_bytes * self.context.parallel.total, available_memory()
        if need > free:
            log.warning(
                "the weights do not fit into host memory, a wake will load them",
                need=mib(need),
                free=mib(free),
            )
            self.drop_weights()
        elif self._model is not None:
            self._host = HostCopy(self._model.tensors(), self.context.device)

    @property
    def _pool_bytes(self) -> int:
        return self._info.num_blocks * self._info.block_size * self._info.kv_bytes_per_token

    def _still_fits(self) -> bool:
        """Return True if, on all ranks, as many blocks as before fit into memory."""
        device = self.context.device
        if device.type == "cpu":  # whose memory is taken as it is used
            need = self._pool_bytes + (self._info.weight_bytes if self._model is None else 0)
            free = available_memory()
        else:
            need = (self._held or 0) - (
                held_bytes(device) or 0
            )  # all that it had, the steps' memory included
            free = torch.cuda.mem_get_info(device)[0]
        return bool(self.context.parallel.agree_least(int(need <= free), device))
