"""What a standby worker does for a start that may come: nothing that takes memory of its own.

On a CPU it maps the packed weights, which it then shares with the worker that serves, and computes one
token, so that the mapping's pages and the code are in place. Where weights cannot be shared, and on a GPU,
it only has their files read into the system's cache: a context on a GPU is created by the start.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ullm.errors import UllmError
from ullm.logs import get_logger
from ullm.model.architectures.registry import choose_device, map_model
from ullm.model.attention.batch import CausalModel
from ullm.model.execution.rank import choose_gather, one_thread, trial_run
from ullm.model.layers.parallel import ParallelContext
from ullm.model.loading.checkpoint import read_checkpoint
from ullm.model.loading.weights import weight_files
from ullm.protocol.messages import Prepare, RankSpec, Start

log = get_logger("ullm.standby")


@dataclass(frozen=True)
class PreparedModel:
    """A model, and what it was prepared for."""

    prepare: Prepare
    model: CausalModel

    def suits(self, start: Start) -> bool:
        """Whether it is the one to be started."""
        ours, theirs = self.prepare, start
        return (ours.config, _place(ours.rank), ours.model_path) == (
            theirs.config,
            _place(theirs.rank),
            theirs.model_path,
        )


def prepare_model(prepare: Prepare) -> PreparedModel | None:
    """The model where it can be shared; None, with a line in the log for what is wrong, if not."""
    config, path = prepare.config, Path(prepare.model_path)
    try:
        device = choose_device(config, prepare.rank.device_index)
        checkpoint = read_checkpoint(path, config, device)
        alone = prepare.rank.world_size == 1  # ranks meet when they start
        with one_thread():
            model = (
                map_model(checkpoint, config, ParallelContext()) if alone and device.type == "cpu" else None
            )
            if model is None:
                read_ahead(weight_files(path))
                return None
            trial_run(
                model, choose_gather(model)(model.kv_shape, 1, config.block_size, model.dtype, device), 1
            )
    except (UllmError, OSError) as error:
        log.info("nothing prepared", reason=str(error))  # the start says so too, if it still is
        return None
    return PreparedModel(prepare, model)


def read_ahead(files: list[Path]) -> None:
    """Have the system read files into its cache, where it knows how to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _place(rank: RankSpec) -> tuple[int, int, int | None]:
    """What a rank's weights depend on."""
    return rank.rank, rank.world_size, rank.device_index
