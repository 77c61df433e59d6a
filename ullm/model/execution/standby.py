"""Prepare a standby worker for a start that may come, without taking memory of its own.

On a CPU it maps the packed weights, which it shares with the serving worker, and computes one token, so that
the mapping's pages and the code are in memory. Where weights cannot be shared, and on a GPU, it only reads
their files into the system's cache; the start creates the context on the GPU.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ullm.errors import UllmError
from ullm.logs import get_logger
from ullm.model.architectures.registry import choose_device, map_model
from ullm.model.attention.batch import CausalModel
from ullm.model.execution.identity import weights_fingerprint
from ullm.model.execution.pools import choose_gather
from ullm.model.execution.rank import single_thread, trial_run
from ullm.model.layers.parallel import ParallelContext
from ullm.model.loading.checkpoint import read_checkpoint
from ullm.model.loading.sources import weight_files
from ullm.protocol.messages import Prepare, RankSpec, Start

log = get_logger(__name__)


@dataclass(frozen=True)
class PreparedModel:
    """A model, the message that it was prepared for, and its rank, which connects when it starts.

    Args:
        fingerprint: of the weights' files, before they were mapped.
    """

    prepare: Prepare
    model: CausalModel
    parallel: ParallelContext
    fingerprint: str = ""

    def suits(self, start: Start) -> bool:
        """Return True if ``start`` wants this model."""
        ours, theirs = self.prepare, start
        return (ours.config, _place(ours.rank), ours.model_path) == (
            theirs.config,
            _place(theirs.rank),
            theirs.model_path,
        )


def prepare_model(prepare: Prepare) -> PreparedModel | None:
    """Return the model if its weights can be shared; None if not. Errors are only logged."""
    config, path = prepare.config, Path(prepare.model_path)
    try:
        device = choose_device(config, prepare.rank.device_index)
        fingerprint = weights_fingerprint(path)
        checkpoint = read_checkpoint(path, config, device)
        parallel = ParallelContext.of(prepare.rank)
        with single_thread():
            model = map_model(checkpoint, config, parallel) if device.type == "cpu" else None
            if model is None:
                read_ahead(weight_files(path))
                return None
            trial_run(
                model, choose_gather(model)(model.kv_shape, 1, config.block_size, model.dtype, device), 1
            )
    except (UllmError, OSError) as error:
        log.info("nothing prepared", reason=str(error))  # the start raises it again, if it is still true
        return None
    return PreparedModel(prepare, model, parallel, fingerprint)


def read_ahead(files: list[Path]) -> None:
    """Ask the system to read files into its cache, where it can."""
    if sys.platform != "linux":
        return
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _place(rank: RankSpec) -> tuple[int, int, int, int | None]:
    """Return the part of a rank that its weights depend on."""
    return rank.rank, rank.world_size, rank.num_stages, rank.device_index
