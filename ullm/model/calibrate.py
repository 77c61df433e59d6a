"""``python -m ullm.model.calibrate``: time the ways to divide products for one model, and keep the best.

Only ways with equal results, bit by bit, are chosen from by time; PyTorch's product, whose sums are in
another order, is timed for comparison. A process of its own, so that no engine's results or threads change.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from ullm.config import EngineConfig, Tuning
from ullm.errors import ResourceUnavailable, UllmError
from ullm.hub.tuning import write_tuning
from ullm.machine import usable_cores
from ullm.model.architectures.decoder import DecoderLayer
from ullm.model.architectures.mlp import GatedMLP
from ullm.model.architectures.registry import build, native_class
from ullm.model.kernels.cpu.kernels import CpuKernels, load_kernels
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.quantization import quantize
from ullm.model.loading.checkpoint import read_checkpoint

QUANTIZED = ("int8", "int4")
ROWS = (1, 4, 16, 64, 512)
SECONDS = 3.0
"""For all measurements together, less what has begun."""
ROUNDS = 40
MARGIN = 0.95
"""Another choice than the default must take at most this share of its time: repeated measurements of
the same choice differ by several percent."""
FROM_MEMORY = 64 << 20
"""Bytes of weights that are multiplied in turn, as far as the model has as many: more than caches hold."""
CANDIDATES = (
    Tuning(),
    Tuning(chunk_tiles=4),
    Tuning(chunk_tiles=16),
    Tuning(piece=24),
    Tuning(piece=96),
    Tuning(prefetch=False),
)

Product = Callable[[], Tensor]


class Timing(msgspec.Struct, frozen=True):
    """The seconds of one layer's products for a number of rows, by candidate: the best of all rounds."""

    rows: int
    seconds: dict[str, float]


class Calibration(msgspec.Struct, frozen=True):
    """The table, and what was picked."""

    tuning: Tuning
    timings: list[Timing]
    path: str = ""


def choose(rounds: Sequence[Mapping[Tuning, float]]) -> Tuning:
    """Return the fastest candidate that beats the default by `MARGIN`, in both halves of the rounds.

    The default, if there is none, or too little time for two rounds.

    Args:
        rounds: for each round the time of each candidate over all rows, relative to the default's.
    """
    middle = len(rounds) // 2
    if not middle:
        return CANDIDATES[0]
    halves = [
        {tuning: median(each[tuning] for each in half) for tuning in rounds[0]}
        for half in (rounds[:middle], rounds[middle:])
    ]
    better = [t for t in rounds[0] if all(half[t] <= MARGIN * half[CANDIDATES[0]] for half in halves)]
    return min(better, key=lambda t: sum(half[t] for half in halves), default=CANDIDATES[0])


def measure(
    use: Callable[[Tuning], None],
    products: Mapping[int, Product],
    candidates: Sequence[Tuning] = CANDIDATES,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = SECONDS,
) -> tuple[list[Mapping[Tuning, float]], list[Timing]]:
    """Time all candidates for all rows, in rounds, until the time is over.

    A candidate whose result differs from the default's is not chosen: its time is infinite. A round that was
    not completed does not count; each number of rows has the same weight. Each round begins with another
    candidate, and each number of rows with a product that is not timed, so that none has the cold start.

    Args:
        use: sets how products are divided.
        products: by rows, a function that computes all of them.
        candidates: the default first.
    """
    end = clock() + seconds
    best: dict[int, dict[str, float]] = {rows: {} for rows in products}
    rounds: list[Mapping[Tuning, float]] = []
    different: set[Tuning] = set()
    for number in range(ROUNDS):
        order = [candidates[(number + i) % len(candidates)] for i in range(len(candidates))]
        total = dict.fromkeys(candidates, 0.0)
        for rows, product in products.items():
            use(candidates[0])
            expected, taken = product(), dict[Tuning, float]()
            for tuning in order:
                if clock() >= end:
                    return rounds, _timings(best, candidates)
                use(tuning)
                began = clock()
                result = product()
                taken[tuning] = clock() - began
                if not torch.equal(result, expected):
                    different.add(tuning)
                known = best[rows].get(tuning.label, taken[tuning])
                best[rows][tuning.label] = min(known, taken[tuning])
            for tuning, spent in taken.items():
                total[tuning] += spent / max(taken[candidates[0]], 1e-9)
        rounds.append({t: float("inf") if t in different else spent for t, spent in total.items()})
    return rounds, _timings(best, candidates)


def _timings(best: Mapping[int, dict[str, float]], candidates: Sequence[Tuning]) -> list[Timing]:
    labels = [tuning.label for tuning in candidates]
    return [
        Timing(rows, {label: seconds[label] for label in labels if label in seconds})
        for rows, seconds in best.items()
    ]


def calibrate(config: EngineConfig, model_path: str) -> Calibration:
    """Measure for the shapes of a model, keep the choice in the cache, and return it with the table.

    Raises:
        ConfigError: ullm's own kernels do not compute this model here.
        ModelError: the model's configuration cannot be read.
    """
    checkpoint = read_checkpoint(Path(model_path), config, torch.device("cpu"))
    native = native_class(checkpoint)
    kernels = None if isinstance(native, str) else load_kernels(checkpoint.dtype)
    model = None if isinstance(native, str) else build(native, checkpoint, ParallelContext())
    if kernels is None or model is None or not model.suits_kernels():
        raise ResourceUnavailable(
            f"{config.model}: there is nothing to calibrate, because ullm's own kernels do not compute this "
            "model here; ullm doctor says whether they are compiled"
        )
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    attention = layers[0].self_attn
    mlp = next(module for module in layers[0].modules() if isinstance(module, GatedMLP))  # or an expert
    matrices = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
    torch.set_num_threads(1)  # for the making of the weights
    threads = config.cpu_threads or usable_cores()
    kernels.use_threads(threads)
    weights = [torch.randn(matrix.shape, dtype=torch.float32) * 0.02 for matrix in matrices]
    size = sum(weight.numel() for weight in weights) * kernels.dtype.itemsize
    copies = max(1, min(len(layers), FROM_MEMORY // size))
    own = cycle([[_own(kernels, w, config.quantization) for w in weights] for _ in range(copies)])
    products = {rows: partial(_next, own, _inputs(weights, rows, kernels.dtype)) for rows in ROWS}
    quantized = config.quantization in QUANTIZED
    candidates = [t for t in CANDIDATES if quantized or t.piece == CANDIDATES[0].piece]
    products[1]()  # wakes the threads
    rounds, timings = measure(
        lambda t: kernels.use_tuning(t.chunk_tiles, t.piece, prefetch=t.prefetch), products, candidates
    )
    torch.set_num_threads(threads)
    _add_torch(timings, weights, kernels.dtype)
    origin = f"calibrated on {date.today().isoformat()}"
    chosen = msgspec.structs.replace(choose(rounds), origin=origin, model=config.model)
    return Calibration(chosen, timings, str(write_tuning(config, model_path, chosen)))


def _own(kernels: CpuKernels, weight: Tensor, quantization: str) -> Callable[[Tensor], Tensor]:
    if quantization in QUANTIZED:
        packed = kernels.pack_quantized(quantize(weight, 8 if quantization == "int8" else 4))
    else:
        packed = kernels.pack(weight.to(kernels.dtype))
    return kernels.linear(packed, None, *weight.shape)


def _inputs(weights: Sequence[Tensor], rows: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(rows, weight.shape[1]).to(dtype) for weight in weights]


def _all(products: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([product(x).flatten() for product, x in zip(products, inputs, strict=True)])


def _next(layers: Iterator[Sequence[Callable[[Tensor], Tensor]]], inputs: Sequence[Tensor]) -> Tensor:
    return _all(next(layers), inputs)


def _add_torch(timings: Sequence[Timing], weights: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Time PyTorch's unquantized product too: once to warm up, once to measure."""
    layers = [partial(_linear, weight.to(dtype)) for weight in weights]
    for timing in timings:
        inputs = _inputs(weights, timing.rows, dtype)
        for _ in range(2):
            began = time.perf_counter()
            _all(layers, inputs)
            timing.seconds["PyTorch"] = time.perf_counter() - began


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def main() -> int:
    """Read configuration and path as JSON from stdin, and write the calibration to stdout."""
    config, model_path = msgspec.json.decode(sys.stdin.buffer.read(), type=tuple[EngineConfig, str])
    try:
        calibration = calibrate(config, model_path)
    except (UllmError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(msgspec.json.encode(calibration).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
