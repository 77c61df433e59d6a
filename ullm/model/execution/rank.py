"""A loaded model on its device with its KV pool, and the steps that make it ready to run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ullm.config import EngineConfig, Tuning
from ullm.errors import OutOfMemory, one_line
from ullm.logs import get_logger
from ullm.machine import usable_cores
from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.registry import choose_device, load_model, native_class
from ullm.model.attention.batch import AttentionBackend, BatchLayout, CausalModel
from ullm.model.attention.varlen import VarlenAttention
from ullm.model.execution.graphs import DecodeGraphs, make_graphs
from ullm.model.execution.identity import kv_identity, weights_fingerprint
from ullm.model.execution.last_tokens import LastTokens
from ullm.model.execution.pools import choose_gather
from ullm.model.execution.verify import verify
from ullm.model.kernels.cpu.build import open_library
from ullm.model.kernels.cpu.exchange import SPINS, SharedExchange
from ullm.model.kernels.cpu.ops import KernelOps
from ullm.model.layers.layer_ops import TorchOps
from ullm.model.layers.parallel import RENDEZVOUS_TIMEOUT, ParallelContext
from ullm.model.loading.checkpoint import Checkpoint, read_checkpoint
from ullm.model.memory.device_memory import release_cached_memory
from ullm.model.memory.kv_pool import (
    check_fits,
    count_blocks,
    cpu_budget,
    effective_block_size,
    kv_bytes_per_token,
)
from ullm.protocol.messages import ModelInfo, Progress, Start
from ullm.scheduling.sequence_blocks import most_blocks

log = get_logger(__name__)

PROGRESS_SECONDS = 1.0
"""Least seconds between two progress messages."""
WORST_CASE_FILTER = (1.0, 0, 0.5, 0.0)
"""The sampling filter that needs the most memory: top_p, which sorts."""
SPARE_SLOTS = 2
"""Slots of last tokens per concurrent sequence; more than are ever used."""


@dataclass(frozen=True)
class RankContext:
    """The model that a rank loads, and its device and peers; survives every sleep.

    Args:
        checkpoint: the model, without its weights.
        config: the engine's options, adapted to the device.
        device: where the model runs.
        parallel: the other ranks of the replica.
        threads: number of threads that compute on a CPU: the kernels' or PyTorch's.
        tuning: how the CPU kernels divide products.
        fingerprint: of the weights' files, before they were read.
    """

    checkpoint: Checkpoint
    config: EngineConfig
    device: torch.device
    parallel: ParallelContext
    threads: int
    tuning: Tuning = Tuning()
    fingerprint: str = ""


@dataclass
class Rank:
    """Everything that one rank holds in memory.

    Args:
        context: what it was loaded from.
        model: the model with its weights.
        backend: the KV pool and its attention.
        last_tokens: each sequence's last sampled token.
        graphs: captured decode steps; None on CPUs and with ``enforce_eager``.
        info: the description of the model that the engine gets.
    """

    context: RankContext
    model: CausalModel
    backend: AttentionBackend
    last_tokens: LastTokens
    graphs: DecodeGraphs | None
    info: ModelInfo


class ConnectableModel(Protocol):
    """A model that a standby worker has prepared, and its rank, which is not connected yet."""

    @property
    def model(self) -> CausalModel:
        """The model with its weights."""

    @property
    def parallel(self) -> ParallelContext:
        """The rank that the model computes for."""

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the weights' files, before they were mapped."""


def open_rank(
    start: Start, progress: Callable[[Progress], None], prepared: ConnectableModel | None = None
) -> Rank:
    """Load the model, size the KV pool, warm up, capture graphs.

    Args:
        start: the message with model, options and rank.
        progress: called with each stage, and now and then within it.
        prepared: the model with its weights, if a standby worker has prepared it.

    Raises:
        ModelError: one line that names file and tensor, or device and bytes.
        ConfigError: options that do not fit this machine or this model.
    """
    context = open_context(start, progress, prepared)
    try:
        with reporting_out_of_memory(context.device):
            if prepared is None:
                model = read_model(context, progress)
            else:
                model = assign_threads(context, prepared.model)
            return attach_kv_pool(context, model, None, progress)
    except BaseException:
        context.parallel.close()
        raise


def open_context(
    start: Start, progress: Callable[[Progress], None], prepared: ConnectableModel | None = None
) -> RankContext:
    """Read the checkpoint's configuration, choose the device, and connect to the other ranks."""
    config = start.config
    device = choose_device(config, start.rank.device_index)
    path = Path(start.model_path)
    fingerprint = weights_fingerprint(path) if prepared is None else prepared.fingerprint
    checkpoint = read_checkpoint(path, config, device)
    # PyTorch counts physical cores, but knows no quota. The ranks of a replica compute at the same time.
    cores = min(torch.get_num_threads(), usable_cores())
    torch.set_num_threads(config.cpu_threads or max(1, cores // start.rank.world_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = config.on_device(device.type)
    parallel = ParallelContext.of(start.rank) if prepared is None else prepared.parallel
    parallel.connect(
        start.rank, device, lambda address: progress(Progress("rendezvous", RENDEZVOUS_TIMEOUT, address))
    )
    if device.type == "cpu" and config.cpu_kernels and parallel.total > 1 and start.rank.shares_memory:
        share_memory(parallel, torch.get_num_threads(), throttled_progress("load", progress))
    return RankContext(
        checkpoint, config, device, parallel, torch.get_num_threads(), start.tuning, fingerprint
    )


def share_memory(parallel: ParallelContext, threads: int, progress: Callable[[], None]) -> None:
    """Have CPU ranks add up through shared memory instead of sockets, where all of them can.

    Args:
        threads: number of threads that each rank computes with.
        progress: called now and then while the kernels are compiled.
    """
    library = open_library(progress)
    # A rank that spins takes a core that others may need, at least the engine. Measured with two ranks on two
    # busy cores: SmolLM2-135M takes 10 ms per step if they sleep at once, 16 to 30 if they spin first.
    spins = SPINS if threads * parallel.total < usable_cores() else 0

    def make(path: str | None) -> SharedExchange:
        if library is None:
            raise OSError("there are no compiled kernels")
        size, rank = parallel.world_size, parallel.rank
        return SharedExchange(library, size, rank, path, spins=spins, timeout=RENDEZVOUS_TIMEOUT)

    parallel.use_exchange(make)


def read_model(context: RankContext, progress: Callable[[Progress], None]) -> CausalModel:
    """Load the model with its weights from disk."""
    checkpoint, config = context.checkpoint, context.config
    native = native_class(checkpoint, context.parallel.world_size)
    if config.verify or isinstance(native, str):  # transformers reports no progress
        progress(Progress("load", config.start_timeout))
    with single_thread():
        model = load_model(
            checkpoint, config, context.device, context.parallel, throttled_progress("load", progress)
        )
    if config.verify:
        log.info(f"{checkpoint.path}: {verify(model, checkpoint)}")
    release_cached_memory(context.device)  # of the unpacked weights
    return assign_threads(context, model)


def assign_threads(context: RankContext, model: CausalModel) -> CausalModel:
    """Give the threads to the kernels, where the model has some, else to PyTorch."""
    if isinstance(model, Decoder) and isinstance(model.ops, KernelOps):
        # The little work left to PyTorch is not worth waiting for OpenMP's threads; see kernels/cpu/pool.h.
        tuning = context.tuning
        model.ops.kernels.use_threads(context.threads)
        model.ops.kernels.use_tuning(tuning.chunk_tiles, tuning.piece, prefetch=tuning.prefetch)
        torch.set_num_threads(1)
    return model


def attach_kv_pool(
    context: RankContext, model: CausalModel, num_blocks: int | None, progress: Callable[[Progress], None]
) -> Rank:
    """Allocate the KV pool of a loaded model and, on CUDA, capture its graphs.

    Args:
        num_blocks: number of KV blocks; None: as many as the options and the memory allow.
    """
    progress(Progress("profile"))
    backend = open_pool(context, model, num_blocks)
    progress(Progress("warmup"))
    vocab_size = trial_run(model, backend, tokens=1).shape[-1]
    info = model_info(context, model, backend, vocab_size)
    last_tokens = LastTokens(SPARE_SLOTS * context.config.max_bs, context.device)
    graphs = None
    if isinstance(backend, VarlenAttention):
        tick = throttled_progress("capture", progress)
        graphs = make_graphs(context.config, model, backend, last_tokens, info.context_len, tick)
    return Rank(context, model, backend, last_tokens, graphs, info)


def open_pool(context: RankContext, model: CausalModel, num_blocks: int | None) -> AttentionBackend:
    """Allocate the KV pool, with the same number of blocks on all ranks, and return its attention backend.

    Raises:
        OutOfMemory: not even one block fits, or fewer than the options demand.
    """
    config, device = context.config, context.device
    varlen = device.type == "cuda" and model.dtype != torch.float32
    block_size = effective_block_size(config.block_size, varlen=varlen)
    make = VarlenAttention if varlen else choose_gather(model)
    block_bytes = block_size * kv_bytes_per_token(model.kv_shape, model.dtype)
    if num_blocks is None and device.type == "cpu":
        num_blocks = count_blocks(config, block_bytes, cpu_budget())
        check_fits(num_blocks, block_bytes)
    elif num_blocks is None:
        trial = make(model.kv_shape, 1, block_size, model.dtype, device)
        num_blocks = count_blocks(config, block_bytes, cuda_budget(model, config, trial))
    num_blocks = context.parallel.agree_least(num_blocks, device)
    return make(model.kv_shape, num_blocks, block_size, model.dtype, device)


def model_info(
    context: RankContext, model: CausalModel, backend: AttentionBackend, vocab_size: int
) -> ModelInfo:
    """Describe the model for the engine. A pool smaller than the model's context limits the context, unless
    the model sees less than its context, and the pool has all that a sequence needs at a time."""
    checkpoint, window = context.checkpoint, model.kv_shape.window or 0
    room = backend.num_blocks * backend.block_size
    most = most_blocks(window, context.config.max_num_batched_tokens, backend.block_size)
    if window and backend.num_blocks >= most:
        room = checkpoint.context_len
    kernels = isinstance(model, Decoder) and isinstance(model.ops, KernelOps)
    return ModelInfo(
        architecture=checkpoint.architecture,
        num_parameters=model.num_parameters(),
        vocab_size=vocab_size,
        eos_token_ids=checkpoint.eos_token_ids,
        context_len=min(checkpoint.context_len, room),
        num_blocks=backend.num_blocks,
        block_size=backend.block_size,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(context.device),
        kv_bytes_per_token=kv_bytes_per_token(model.kv_shape, model.dtype),
        weight_bytes=model.weight_bytes(),
        weight_formats=model.weight_formats(),
        kv_dtype=str(model.dtype).removeprefix("torch."),
        kernels=model.ops.name if isinstance(model, Decoder) else TorchOps.name,
        tuning=context.tuning.origin if kernels else "",
        stored_format="gguf" if checkpoint.path.suffix == ".gguf" else checkpoint.stored_format,
        pools=True,
        window=window,
        kv_identity=kv_identity(
            checkpoint, context.config, context.fingerprint, model, backend, context.device
        ),
    )


@contextmanager
def single_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread in this context.

    Copying and packing many small tensors is as fast that way, and much faster beside busy processes: each
    parallel region would wait for a thread that is not scheduled.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def reporting_out_of_memory(device: torch.device) -> Iterator[None]:
    """Turn a failed allocation, by any allocator, into one line.

    Raises:
        OutOfMemory: an allocation failed; names the device.
    """
    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{device}: {one_line(error)}") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the error is a failed allocation, by any allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@torch.inference_mode()
def trial_run(model: CausalModel, backend: AttentionBackend, tokens: int, rows: int = 1) -> Tensor:
    """Prefill ``tokens`` zeros in block 0, as sequences of at most one block.

    The KV that it leaves in the pool is overwritten before it is read.

    Returns:
        Logits of the last ``rows`` tokens, ``[rows, vocab_size]``.
    """
    size = backend.block_size
    lens = [size] * (tokens // size) + [tokens % size] * (tokens % size > 0)
    positions = np.concatenate([np.arange(length) for length in lens])
    layout = BatchLayout(
        token_ids=np.zeros(tokens, dtype=np.int64),
        positions=positions,
        query_lens=lens,
        seq_lens=lens,
        block_tables=np.zeros((len(lens), 1), dtype=np.int32),
        slot_mapping=positions,
        num_decodes=tokens if size == 1 else int(lens == [1]),
    )
    batch = backend.prepare(layout)
    hidden = model.forward(batch.token_ids, batch)
    return model.logits(hidden[-rows:])


@torch.inference_mode()
def cuda_budget(model: CausalModel, config: EngineConfig, backend: AttentionBackend) -> int:
    """Return bytes for the KV pool: the GPU's share of memory, less the measured need of the largest step."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats(device)
    logits = trial_run(model, backend, config.max_num_batched_tokens, config.max_bs)
    rows = len(logits)
    model.choose(logits, [WORST_CASE_FILTER] * rows, [0.0] * rows)
    del logits
    torch.cuda.synchronize(device)
    backend.release()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)
    return int(total * config.gpu_memory_utilization) - elsewhere - peak


def throttled_progress(stage: str, progress: Callable[[Progress], None]) -> Callable[[], None]:
    """Report a stage now; return a function that reports it again, at most once per `PROGRESS_SECONDS`."""
    last = time.monotonic()
    progress(Progress(stage))

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            progress(Progress(stage))

    return tick
