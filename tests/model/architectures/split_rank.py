"""Run by test_split_architectures.py, once per rank: logits of tiny models that transformers splits.

Arguments: folder with a folder per model, rank, number of ranks, rendezvous, output file, models.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.model.model_fixtures import LogitsModel, random_tokens
from ullm.errors import ModelError
from ullm.model.architectures import registry
from ullm.model.layers.parallel import open_parallel
from ullm.protocol.messages import RankSpec

LENGTH, FIRST = 20, 19
"""Tokens of the prompt, and of its first step."""


def logits(folder: Path) -> torch.Tensor | str:
    """Return the logits of all tokens; a text if the model is refused."""
    try:
        model = LogitsModel(folder, parallel)
    except ModelError as error:
        return str(error)
    model.add(0, random_tokens(LENGTH, seed=1), [0, 1, 2, 3, 4])
    return torch.cat([model.step((0, 0, FIRST))[0], model.step((0, FIRST, LENGTH - FIRST))[0]])


if __name__ == "__main__":
    root, rank, size, meet, out, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    registry.NATIVE.clear()  # so that transformers' code runs them all
    spec = RankSpec(rank=int(rank), world_size=int(size), rendezvous=meet)
    parallel = open_parallel(spec, torch.device("cpu"))
    torch.save({kind: logits(Path(root, kind)) for kind in kinds}, out)
    parallel.close()
