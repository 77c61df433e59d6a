"""The memory for keys and values, and which sequences are computed together in it."""

from __future__ import annotations

from dataclasses import dataclass

from ullm.config.options import option


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = option(16, "Tokens per KV block; on CUDA it is rounded up to a multiple of 256.")
    gpu_memory_utilization: float = option(
        0.9, "Share of the GPU's memory for weights, activations and KV cache, above 0 and at most 1."
    )
    kv_cache_memory: int | None = option(
        None,
        "Size of the KV cache in bytes per rank; default: computed from the free memory.",
        aliases=("--kv-cache-memory-bytes",),
    )
    num_blocks: int | None = option(
        None,
        "Size of the KV cache in blocks, instead of bytes; default: computed from the free memory.",
        aliases=("--num-gpu-blocks-override",),
    )
    prefix_cache: bool = option(
        True, "Reuse the KV blocks of equal prefixes.", aliases=("--enable-prefix-caching",)
    )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Continuous batching."""

    max_bs: int = option(
        0,
        "Maximum number of concurrent sequences; 0: 64 on a CPU, 256 on a GPU.",
        aliases=("--max-num-seqs",),
    )
    max_num_batched_tokens: int = option(
        0,
        "Maximum number of tokens per step, prefill chunks and decodes together; 0: 512 on a CPU, 8192 on a "
        "GPU, but at least --max-bs.",
    )
    max_queue: int = option(
        1024, "Maximum number of requests waiting to run; further ones are refused with status 429."
    )
    max_admitted_tokens: int | None = option(
        None,
        "Maximum number of tokens, prompts and possible outputs together, of all admitted requests; further "
        "requests are refused with status 429. Default: no limit.",
    )
    steps_ahead: int = option(
        1, "Steps scheduled before the results of the running step are in, 0 or 1 (async scheduling)."
    )
    speculate: int = option(
        0,
        "Maximum number of speculative tokens per sequence and step, drafted from repetitions in its text "
        "and verified in one step; 0: none. While drafts are accepted, no step is scheduled ahead.",
        aliases=("--num-speculative-tokens",),
    )
