"""A rank asleep: what it gives back, at which level, and how it comes back.

On a GPU level 1 brings the weights to host memory. On a CPU that is where they are, so they stay, and
only the KV pool goes. Level 2 drops the weights, and a wake loads them as a start does. Process groups
stay open. The ranks of a replica sleep and wake together: what waking does is partly collective.
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
from ullm.model.execution.rank import Rank, furnish, naming_out_of_memory, read_model, throttled
from ullm.model.memory.device_memory import Meter, held
from ullm.model.memory.host_copy import HostCopy
from ullm.model.memory.kv_pool import mib
from ullm.protocol.messages import Progress

log = get_logger("ullm.sleep")


class SleepingRank:
    """Takes over all that a rank holds, and lets go of it piece by piece.

    Args:
        rank: must not be used afterwards.
    """

    def __init__(self, rank: Rank) -> None:
        self.site, self._info = rank.site, rank.info
        self._graphs: DecodeGraphs | None = rank.graphs
        self._backend: AttentionBackend | None = rank.backend
        self._model: CausalModel | None = rank.model
        self._host: HostCopy | None = None
        self._held: int | None = None
        del rank.graphs, rank.last_tokens, rank.backend, rank.model  # so that nothing else keeps them

    def sleep(self, level: int) -> dict[str, int]:
        """See `ullm.protocol.runner.Runner.sleep`."""
        if self._held is None:
            self._held = held(self.site.device)
        meter = Meter(self.site.device)
        if self._graphs is not None:
            meter.release("graphs", self.drop_graphs, nominal=0)
        if self._backend is not None:
            meter.release("kv_cache", self.drop_pool, nominal=self._pool_bytes)
        if level > 1 and self._model is not None:
            here = self._host is None
            meter.release("weights", self.drop_weights, nominal=here * self._info.weight_bytes)
        elif level == 1 and self.site.device.type != "cpu":
            meter.release("weights", self.park_weights, nominal=self._info.weight_bytes)
        return meter.given_back

    def wake(self, progress: Callable[[Progress], None]) -> Rank:
        """A rank as before, with an empty pool.

        Raises:
            ModelError: the weights cannot be loaded any more, or there is no room for them.
        """
        with naming_out_of_memory(self.site.device):
            num_blocks = self._info.num_blocks if self._still_fits() else None
            if self._model is None:
                self._model = read_model(self.site, progress)
            elif self._host is not None:
                self._host.restore(throttled("load", progress))
                self._host = None
            return furnish(self.site, self._model, num_blocks, progress)

    def drop_graphs(self) -> None:
        """Free the captured steps."""
        if self._graphs is not None:
            self._graphs.release()
            self._graphs = None

    def drop_pool(self) -> None:
        """Free the KV cache."""
        if self._backend is not None:
            self._backend.release()
            self._backend = None

    def drop_weights(self) -> None:
        """Free the weights, wherever they are."""
        self._host = None
        if self._model is None:
            return
        model = weakref.ref(self._model)
        self._model = None
        if model() is not None:  # transformers' models have reference cycles
            gc.collect()

    def park_weights(self) -> None:
        """Bring the weights to host memory; where that has no room for them, a wake has to load them."""
        # All ranks ask at the same time, and most likely on the same machine.
        need, free = self._info.weight_bytes * self.site.parallel.world_size, available_memory()
        if need > free:
            log.warning("no room for the weights in host memory", need=mib(need), free=mib(free))
            self.drop_weights()
        elif self._model is not None:
            self._host = HostCopy(self._model.tensors(), self.site.device)

    @property
    def _pool_bytes(self) -> int:
        return self._info.num_blocks * self._info.block_size * self._info.kv_bytes_per_token

    def _still_fits(self) -> bool:
        """Whether there is room, on all ranks, for as many blocks as before."""
        device = self.site.device
        if device.type == "cpu":  # where memory is taken as it is used
            need = self._pool_bytes + (self._info.weight_bytes if self._model is None else 0)
            free = available_memory()
        else:
            need = (self._held or 0) - (held(device) or 0)  # what it had, steps' memory included
            free = torch.cuda.mem_get_info(device)[0]
        return bool(self.site.parallel.agree_least(int(need <= free), device))
