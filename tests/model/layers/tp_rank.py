"""Run by test_parallel.py, once per rank: greedy tokens and logits of a tiny model, written to a file;
tokens again after each kind of sleep.

Arguments: model folder, rank, world size, stages, two rendezvous, output file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch

from tests.model.model_fixtures import LogitsModel, generate, load_runner, random_tokens
from ullm.model.layers.parallel import open_parallel
from ullm.protocol.messages import RankSpec

if __name__ == "__main__":
    folder, rank, world_size, stages, first, second, out = sys.argv[1:]
    torch.set_num_threads(1)
    spec = RankSpec(rank=int(rank), world_size=int(world_size), rendezvous=second, num_stages=int(stages))
    parallel = open_parallel(msgspec.structs.replace(spec, rendezvous=first), torch.device("cpu"))
    model, tokens = LogitsModel(Path(folder), parallel), random_tokens(20, seed=1)
    model.add(0, tokens, [0, 1, 2, 3, 4])
    logits = torch.cat([model.step((0, 0, 19))[0], model.step((0, 19, 1))[0]])
    parallel.close()
    runner = load_runner(Path(folder), spec, tp_size=int(world_size))
    generated = [generate(runner, tokens, 8)]
    for levels in ([1], [2], [1, 2]):  # the ranks meet once and stay together
        for level in levels:
            runner.sleep(level)
        runner.wake(lambda _: None)
        generated.append(generate(runner, tokens, 8))
    torch.save({"logits": logits, "generated": generated, "closed": list(runner.close())}, out)
