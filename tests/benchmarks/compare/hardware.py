"""Limits of the hardware: measured bandwidth and arithmetic, and the roofline of decoding that they give.

One decode step of ``n`` streams reads all weights once and each stream's KV cache, and does two operations
per weight and stream, so it takes at least
``max((weights + n · context · kv) / bandwidth, 2 · parameters · n / arithmetic)`` seconds for ``n`` tokens
(S. Williams et al., Roofline, CACM 52/4, 2009).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from tests.benchmarks import scripts
from ullm.errors import UllmError, UsageError

READ_BYTES = 256 << 20
"""Bytes that each thread reads; more than any cache holds."""
REPEATS = 6
PROBE_SECONDS = 120.0


class MachineUnknown(UllmError):
    """The machine's limits could not be measured."""


class ModelShape(msgspec.Struct, frozen=True):
    """The sizes of a model that the roofline depends on.

    Args:
        kv_bytes: bytes of KV per token, two per number.
        head: number of weights of the last layer, which computes logits; they may be the embedding's.
    """

    parameters: int
    kv_bytes: int
    head: int = 0


class Limits(msgspec.Struct, frozen=True):
    """Limits of a machine: bytes per second read from memory, operations per second in matrix products."""

    bandwidth: float
    arithmetic: float


def model_shape(folder: Path) -> ModelShape:
    """Read a model's sizes from its config.json and the headers of its weights.

    Raises:
        UsageError: the folder does not have them.
    """
    config = folder / "config.json"
    files = sorted(folder.glob("*.safetensors"))
    if not config.is_file() or not files:
        raise UsageError(f"{folder}: expected a model's folder, with config.json and *.safetensors")
    shape = json.loads(config.read_text("utf-8"))
    heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
    size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    kv_bytes = 2 * 2 * shape["num_hidden_layers"] * heads * size
    return ModelShape(sum(map(_elements, files)), kv_bytes, shape["vocab_size"] * shape["hidden_size"])


def measure_bandwidth() -> float:
    """Measure the bytes per second that all cores read together; takes a second."""
    return read_bandwidth(_cores())


def roofline(streams: float, shape: ModelShape, limits: Limits, weight_bits: float, context: float) -> float:
    """Return the maximum tokens per second; see the module.

    Args:
        context: average number of tokens per stream whose KV is read.
    """
    read = shape.parameters * weight_bits / 8 + streams * context * shape.kv_bytes
    return streams / max(read / limits.bandwidth, 2 * shape.parameters * streams / limits.arithmetic)


def read_bandwidth(threads: int) -> float:
    """Measure the bytes per second that ``threads`` threads read together, in dot products."""
    import numpy

    arrays = [numpy.ones(READ_BYTES // 4, numpy.float32) for _ in range(threads)]
    best = min(_seconds_of([lambda a=a: a.dot(a) for a in arrays]) for _ in range(REPEATS))
    return threads * READ_BYTES / best


def matrix_speed() -> float:
    """Measure the operations per second of a bfloat16 matrix product, in a process of its own that has torch.

    Raises:
        MachineUnknown: that process failed.
    """
    script = str(Path(scripts.__file__).with_name("matrix_speed.py"))
    command = [sys.executable, script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
    except subprocess.SubprocessError as error:
        raise MachineUnknown(f"{script}: {error}") from None
    return float(done.stdout)


def _seconds_of(jobs: list[Any]) -> float:
    begin = threading.Barrier(len(jobs) + 1)

    def run(job: Any) -> None:
        begin.wait()
        job()

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    begin.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def _elements(file: Path) -> int:
    with file.open("rb") as data:
        header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    total = 0
    for name, tensor in header.items():
        count = 1
        for size in tensor["shape"] if name != "__metadata__" else [0]:
            count *= size
        total += count
    return total


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
