"""A loaded model on its device, with its KV pool: what a `ModelRunner` runs, and how it comes and goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ullm.config import EngineConfig
from ullm.errors import OutOfMemory
from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.registry import NATIVE, choose_device, load_model
from ullm.model.attention.batch import AttentionBackend, CausalModel, Layout
from ullm.model.attention.gather import GatherAttention
from ullm.model.attention.varlen import VarlenAttention
from ullm.model.execution.graphs import DecodeGraphs, make_graphs
from ullm.model.execution.last_tokens import LastTokens
from ullm.model.kernels.cpu.ops import KernelAttention, KernelOps
from ullm.model.layers.parallel import ParallelContext, open_parallel
from ullm.model.loading.checkpoint import Checkpoint, read_checkpoint
from ullm.model.memory.device_memory import let_go
from ullm.model.memory.kv_pool import (
    check_fits,
    count_blocks,
    cpu_budget,
    kv_bytes_per_token,
    true_block_size,
)
from ullm.protocol.messages import ModelInfo, Progress, Start

SIGN_OF_LIFE = 1.0
"""Seconds between signs of life while weights load."""
THRIFTLESS = (1.0, 0, 0.5, 0.0)
"""How to choose a token such that most memory is needed: of all temperatures and filters, top_p sorts."""
SPARE_SLOTS = 2
"""Slots of last tokens for each sequence that runs at once; more than are ever used."""


@dataclass(frozen=True)
class Site:
    """What a rank loads, and where: what stays through every sleep.

    Args:
        threads: that PyTorch computes with on a CPU, or the kernels in its place.
    """

    checkpoint: Checkpoint
    config: EngineConfig
    device: torch.device
    parallel: ParallelContext
    threads: int


@dataclass
class Rank:
    """Everything that one rank holds.

    Args:
        last_tokens: what was sampled last, by slot.
        graphs: captured decode steps; None on CPUs and with ``enforce_eager``.
    """

    site: Site
    model: CausalModel
    backend: AttentionBackend
    last_tokens: LastTokens
    graphs: DecodeGraphs | None
    info: ModelInfo


def open_rank(
    start: Start, progress: Callable[[Progress], None], prepared: CausalModel | None = None
) -> Rank:
    """Load the model, size the KV pool, warm up, capture.

    Args:
        prepared: the model with its weights, where they have been brought here already.

    Raises:
        ModelError: one line that names file and tensor, or device and bytes.
        ConfigError: options that do not fit this machine or this model.
    """
    site = open_site(start)
    try:
        with naming_out_of_memory(site.device):
            model = read_model(site, progress) if prepared is None else share_cores(site, prepared)
            return furnish(site, model, None, progress)
    except BaseException:
        site.parallel.close()
        raise


def open_site(start: Start) -> Site:
    """Read what the model is, take the device, and meet the other ranks."""
    config = start.config
    device = choose_device(config, start.rank.device_index)
    checkpoint = read_checkpoint(Path(start.model_path), config, device)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = config.on_device(device.type)
    return Site(checkpoint, config, device, open_parallel(start.rank, device), torch.get_num_threads())


def read_model(site: Site, progress: Callable[[Progress], None]) -> CausalModel:
    """The model with its weights, from disk."""
    checkpoint, config = site.checkpoint, site.config
    if checkpoint.architecture not in NATIVE:  # transformers gives no signs of life while it loads
        progress(Progress("load", config.start_timeout))
    with one_thread():
        model = load_model(checkpoint, config, site.device, site.parallel, throttled("load", progress))
    let_go(site.device)  # of the weights as they were before they were packed
    return share_cores(site, model)


def share_cores(site: Site, model: CausalModel) -> CausalModel:
    """Say which threads compute: the kernels' or PyTorch's."""
    if isinstance(model, Decoder) and isinstance(model.ops, KernelOps):
        # What little is left to PyTorch is not worth waiting for OpenMP's threads; see cpu/pool.h.
        model.ops.kernels.use_threads(site.threads)
        torch.set_num_threads(1)
    return model


def furnish(
    site: Site, model: CausalModel, num_blocks: int | None, progress: Callable[[Progress], None]
) -> Rank:
    """What goes with a model: a KV pool, and captured steps.

    Args:
        num_blocks: of the pool; None: as many as options and memory say.
    """
    progress(Progress("profile"))
    backend = open_pool(site, model, num_blocks)
    progress(Progress("warmup"))
    vocab_size = trial_run(model, backend, tokens=1).shape[-1]
    info = describe(site, model, backend, vocab_size)
    last_tokens = LastTokens(SPARE_SLOTS * site.config.max_bs, site.device)
    graphs = None
    if isinstance(backend, VarlenAttention):
        tick = throttled("capture", progress)
        graphs = make_graphs(site.config, model, backend, last_tokens, info.context_len, tick)
    return Rank(site, model, backend, last_tokens, graphs, info)


def open_pool(site: Site, model: CausalModel, num_blocks: int | None) -> AttentionBackend:
    """The KV pool, of the same number of blocks on all ranks, and the attention that goes with it.

    Raises:
        OutOfMemory: not even one block fits, or fewer than were asked for.
    """
    config, device = site.config, site.device
    varlen = device.type == "cuda" and model.dtype != torch.float32
    block_size = true_block_size(config.block_size, varlen=varlen)
    make = VarlenAttention if varlen else choose_gather(model)
    block_bytes = block_size * kv_bytes_per_token(model.kv_shape, model.dtype)
    if num_blocks is None and device.type == "cpu":
        num_blocks = count_blocks(config, block_bytes, cpu_budget())
        check_fits(num_blocks, block_bytes)
    elif num_blocks is None:
        trial = make(model.kv_shape, 1, block_size, model.dtype, device)
        num_blocks = count_blocks(config, block_bytes, cuda_budget(model, config, trial))
    num_blocks = site.parallel.agree_least(num_blocks, device)
    return make(model.kv_shape, num_blocks, block_size, model.dtype, device)


def choose_gather(model: CausalModel) -> type[GatherAttention | KernelAttention]:
    """The attention that goes with how a model computes its layers."""
    if isinstance(model, Decoder) and isinstance(model.ops, KernelOps):
        return KernelAttention
    return GatherAttention


def describe(site: Site, model: CausalModel, backend: AttentionBackend, vocab_size: int) -> ModelInfo:
    """What the engine is told; a pool that is smaller than the model's context limits it."""
    checkpoint = site.checkpoint
    return ModelInfo(
        architecture=checkpoint.architecture,
        num_parameters=model.num_parameters(),
        vocab_size=vocab_size,
        eos_token_ids=checkpoint.eos_token_ids,
        context_len=min(checkpoint.context_len, backend.num_blocks * backend.block_size),
        num_blocks=backend.num_blocks,
        block_size=backend.block_size,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(site.device),
        kv_bytes_per_token=kv_bytes_per_token(model.kv_shape, model.dtype),
        weight_bytes=model.weight_bytes(),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Copying and packing many small tensors is as fast with one thread, and much faster where other
    processes keep the cores busy: each parallel region then waits for a thread that is not scheduled."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def naming_out_of_memory(device: torch.device) -> Iterator[None]:
    """Failed allocations, by whichever allocator, as one line.

    Raises:
        OutOfMemory: names the device.
    """
    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{device}: {str(error).splitlines()[0]}") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, by whichever allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@torch.inference_mode()
def trial_run(model: CausalModel, backend: AttentionBackend, tokens: int, rows: int = 1) -> Tensor:
    """Prefill ``tokens`` zeros in block 0, as sequences of at most one block.

    What it leaves in the pool is overwritten before it is read.

    Returns:
        the logits of the last ``rows`` tokens.
    """
    size = backend.block_size
    lens = [size] * (tokens // size) + [tokens % size] * (tokens % size > 0)
    positions = np.concatenate([np.arange(length) for length in lens])
    layout = Layout(
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
    """Bytes for the KV pool: the GPU's share of memory, less what the largest step was seen to need."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats(device)
    logits = trial_run(model, backend, config.max_num_batched_tokens, config.max_bs)
    rows = len(logits)
    model.choose(logits, [THRIFTLESS] * rows, [0.0] * rows)
    del logits
    torch.cuda.synchronize(device)
    backend.release()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)
    return int(total * config.gpu_memory_utilization) - elsewhere - peak


def throttled(stage: str, progress: Callable[[Progress], None]) -> Callable[[], None]:
    """A sign of life now, and then one per `SIGN_OF_LIFE` at most."""
    last = time.monotonic()
    progress(Progress(stage))

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last >= SIGN_OF_LIFE:
            last = time.monotonic()
            progress(Progress(stage))

    return tick
