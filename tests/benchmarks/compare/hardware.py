"""The hardware: its description, measured bandwidth and arithmetic, and the roofline that they give.

One decode step of ``n`` streams reads all weights once and each stream's KV cache, and does two operations
per weight and stream, so it takes at least
``max((weights + n · context · kv) / bandwidth, 2 · parameters · n / arithmetic)`` seconds for ``n`` tokens
(S. Williams et al., Roofline, CACM 52/4, 2009).
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tests.benchmarks import scripts
from ullm.bench import bench_report
from ullm.errors import UllmError, UsageError
from ullm.hub.convert import tokenizer_folder
from ullm.hub.files import silent
from ullm.machine import usable_cores

READ_BYTES = 256 << 20
"""Bytes that each thread reads; more than any cache holds."""
REPEATS = 6
PROBE_SECONDS = 120.0
PLAIN_BITS = 16
"""Weights of fewer bits are multiplied in integers by engines that can."""
HEADS = {"lm_head.weight", "output.weight"}
"""Names of a head that is not the embedding, in safetensors and in GGUF files."""
FLAGS = (
    "avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile "
    "amx_int8 amx_bf16 asimd asimdhp asimddp i8mm bf16 sve sve2"
).split()
"""Flags of x86-64 and ARM processors that kernels are chosen by, as /proc/cpuinfo spells them."""
CAPS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "OV_CPU_MAX_ISA",
    "OPENBLAS_CORETYPE",
    "CXX",
)
"""Environment variables that keep libraries, or compilers, from using all of the processor's instructions."""


class MachineUnknown(UllmError):
    """The machine's limits could not be measured."""


class ModelShape(msgspec.Struct, frozen=True):
    """The sizes of a model that the roofline depends on.

    Args:
        kv_bytes: bytes of KV per token, two per number.
        head: number of weights of the last layer, which computes logits; they may be the embedding's.
        layers: number of weights of all other layers, without the embedding's.
    """

    parameters: int
    kv_bytes: int
    head: int = 0
    layers: int = 0


class Limits(msgspec.Struct, frozen=True):
    """Limits of a device.

    Args:
        bandwidth: bytes per second read from memory.
        arithmetic: operations per second in matrix products of the faster float dtype.
        integer: the same in products of eight-bit integers; 0 if unknown.
    """

    bandwidth: float
    arithmetic: float
    integer: float = 0.0

    def operations(self, weight_bits: float) -> float:
        """Return the maximum operations per second with weights of so many bits."""
        return max(self.arithmetic, self.integer) if weight_bits < PLAIN_BITS else self.arithmetic

    def __str__(self) -> str:
        products = f"multiplied at {self.arithmetic / 1e12:.2f} TFLOP/s"
        integers = f" and {self.integer / 1e12:.2f} TOP/s in int8" if self.integer else ""
        return f"memory read at {self.bandwidth / 1e9:.0f} GB/s, matrices {products}{integers}"


@dataclass(frozen=True)
class MeasuredDevice:
    """The device that the engines run on."""

    name: str
    limits: Limits


def median_limits(limits: Sequence[Limits]) -> Limits:
    """Return the median of each limit; 0 without any."""
    fields = zip(*(msgspec.structs.astuple(each) for each in limits), strict=True)
    return Limits(*map(statistics.median, fields)) if limits else Limits(0.0, 0.0)


def machine() -> dict[str, Any]:
    """Describe the machine: its processor with the flags that matter, and what holds libraries back."""
    model, flags = read_processor()
    held = {name: os.environ[name] for name in CAPS if os.environ.get(name)}
    return {**bench_report.machine(), "processor": model, "flags": flags, "held": held}


def describe(machine: Mapping[str, Any]) -> str:
    """Return a `machine` in one phrase."""
    held = ", ".join(f"{name}={value}" for name, value in machine["held"].items())
    flags = " ".join(machine["flags"]) or "flags unknown"
    return (
        f"{machine['cores']} cores ({machine['processor']}; {flags}), "
        f"{machine['platform']}{f', held to {held}' if held else ''}"
    )


def read_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, list[str]]:
    """Return the processor's name and those of `FLAGS` that it has; none where there is no cpuinfo."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text("utf-8", "replace").splitlines()]
    except OSError:  # not Linux
        lines = []
    values = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    present = values.get("flags", values.get("Features", "")).split()
    name = values.get("model name") or platform.processor() or platform.machine()
    return name, [flag for flag in FLAGS if flag in present]


def read_config(model: Path) -> dict[str, Any]:
    """Return the config.json of a model's folder, or the one made from a GGUF file's metadata.

    Raises:
        UsageError: the folder has none.
        ModelError: the GGUF file cannot be read.
    """
    config = (tokenizer_folder(model, silent) if model.is_file() else model) / "config.json"
    if not config.is_file():
        raise UsageError(
            f"{model}: expected a model's folder, with config.json and *.safetensors, or a GGUF file"
        )
    content: dict[str, Any] = json.loads(config.read_text("utf-8"))
    return content


def model_shape(model: Path) -> ModelShape:
    """Read a model's sizes from its config and the headers of its weights.

    Args:
        model: folder with config.json and *.safetensors, or a GGUF file.

    Raises:
        UsageError: the folder does not have them.
        ModelError: the GGUF file cannot be read.
    """
    config = read_config(model)
    weights = _gguf_weights(model) if model.is_file() else _folder_weights(model)
    parameters = sum(weights.values())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_bytes = 2 * 2 * config["num_hidden_layers"] * heads * size
    head = config["vocab_size"] * config["hidden_size"]
    embedding = head if weights.keys() & HEADS else 0  # otherwise the head is the embedding
    return ModelShape(parameters, kv_bytes, head, parameters - head - embedding)


def measure_device(device: str = "cpu") -> MeasuredDevice:
    """Measure the bandwidth and arithmetic of a device, in a process that has PyTorch.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        MachineUnknown: that process failed.
    """
    script = str(Path(scripts.__file__).with_name("device_limits.py"))
    try:
        done = subprocess.run(
            [sys.executable, script, device],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or [f"status {error.returncode}"]
        raise MachineUnknown(f"device {device} cannot be measured by {script}: {lines[-1]}") from None
    except subprocess.SubprocessError as error:
        raise MachineUnknown(f"{script}: {error}") from None
    result = json.loads(done.stdout.splitlines()[-1])
    bandwidth = result["bandwidth"] or measure_bandwidth()
    return MeasuredDevice(result["device"], Limits(bandwidth, result["arithmetic"], result["integer"]))


def measure_limits() -> Limits:
    """Measure the CPU's limits; takes a few seconds.

    Raises:
        MachineUnknown: they could not be measured.
    """
    return measure_device().limits


def measure_bandwidth() -> float:
    """Measure the bytes per second that all cores read together; takes a second."""
    return read_bandwidth(usable_cores())


def roofline(streams: float, shape: ModelShape, limits: Limits, weight_bits: float, context: float) -> float:
    """Return the maximum tokens per second; see the module.

    Args:
        context: average number of tokens per stream whose KV is read.
    """
    read = shape.parameters * weight_bits / 8 + streams * context * shape.kv_bytes
    operations = 2 * shape.parameters * streams
    return streams / max(read / limits.bandwidth, operations / limits.operations(weight_bits))


def read_bandwidth(threads: int) -> float:
    """Measure the bytes per second that ``threads`` threads read together, in dot products."""
    import numpy

    arrays = [numpy.ones(READ_BYTES // 4, numpy.float32) for _ in range(threads)]
    best = min(_seconds_of([lambda a=a: a.dot(a) for a in arrays]) for _ in range(REPEATS))
    return threads * READ_BYTES / best


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


def _folder_weights(folder: Path) -> dict[str, int]:
    """Return name → number of elements of all tensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(
            f"{folder}: expected a model's folder, with config.json and *.safetensors, or a GGUF file"
        )
    weights: dict[str, int] = {}
    for file in files:
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        weights |= {name: math.prod(tensor["shape"]) for name, tensor in tensors.items()}
    return weights


def _gguf_weights(file: Path) -> dict[str, int]:
    from ullm.model.loading.gguf_file import GgufFile  # its libraries take long to import

    return {name: math.prod(tensor.shape) for name, tensor in GgufFile(file).tensors.items()}
