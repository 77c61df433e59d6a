"""Configuration: one frozen dataclass per concern, each default written once.

An `EngineConfig` *is* each of its concerns, so it reads flat (``config.block_size``) while a
component asks only for what it needs (``def __init__(self, config: CacheConfig)``). Command line
flags, ``ULLM_*`` variables and docs/configuration.md are derived from the fields and from the
``help`` of their metadata.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from ullm.errors import ConfigError

MINUTES = 60.0
GIB = 1 << 30
MAX_THREADS = 1024
MAX_SLEEP_LEVEL = 3
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""Stands for the embedded default model; see `ullm.hub`."""

SleepMode = Literal["wait", "abort", "keep"]
"""What becomes of the requests in flight when the engine is put to sleep."""
Transport = Literal["auto", "process", "thread", "ray", "fake"]


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the help text that the command line and the docs show."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and in which numbers it computes."""

    model: str = option(DEFAULT_MODEL, "Hub id, local folder, or .gguf file; the default is embedded.")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    tokenizer: str | None = option(None, "Folder or hub id of the tokenizer, if not the model's own.")
    served_model_name: str | None = option(None, "The name that the API shows; default: the model's.")
    chat_template: str | None = option(None, "File with a Jinja chat template that replaces the model's.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Numbers to compute in; auto: the checkpoint's, where the device is fast at them."
    )
    quantization: Literal["auto", "none", "int8", "int4"] = option(
        "auto",
        "Bits of the weights on a CPU: int8, int4 round them when they are loaded, none makes plain numbers "
        "of them; auto: as the checkpoint has them.",
    )
    context_len: int | None = option(
        None, "Most tokens of prompt and output; never more than the model's own limit."
    )
    load_format: Literal["auto", "dummy"] = option("auto", "dummy: random weights of the model's shape.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")
    enforce_eager: bool = option(False, "Do not capture CUDA graphs.")
    cpu_kernels: bool = option(True, "On CPUs, compile fused kernels where a C++ compiler is found.")
    gpu_kernels: bool = option(
        True, "On CUDA, compile fused kernels where Triton works and agrees with PyTorch."
    )
    runner: str = option(
        "ullm.model.execution.runner:ModelRunner",
        "What workers run, as module:class; for tests and experiments.",
    )

    @property
    def model_name(self) -> str:
        """The name that the API shows."""
        return self.served_model_name or os.path.basename(self.model.rstrip("/")) or self.model


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = option(16, "Tokens per KV block (on CUDA a multiple of 256 is used).")
    gpu_memory_utilization: float = option(0.9, "Share of the GPU's memory for weights, activations and KV.")
    kv_cache_memory: int | None = option(None, "Bytes of KV cache per rank; default: from the free memory.")
    num_blocks: int | None = option(None, "KV blocks, instead of a size in bytes.")
    prefix_cache: bool = option(True, "Reuse the KV blocks of equal prefixes.")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Continuous batching."""

    max_bs: int = option(0, "Most sequences that run at once; 0: 64 on a CPU, 256 on a GPU.")
    max_num_batched_tokens: int = option(
        0,
        "Most tokens per step, prefill chunks and decodes together; 0: 512 on a CPU, 8192 on a GPU, but not "
        "less than --max-bs.",
    )
    max_queue: int = option(1024, "Most requests waiting to run; further ones are refused with 429.")
    max_admitted_tokens: int | None = option(
        None, "Most tokens, prompts and possible outputs together, of all admitted requests; then 429."
    )
    steps_ahead: int = option(1, "Steps planned before the results of the running one are in; 0 or 1.")
    speculate: int = option(
        0,
        "Most tokens per sequence and step that are guessed from repetitions in its text and verified in one "
        "go; 0: none. While guesses pay, steps are not planned ahead.",
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Ranks, replicas and where they run."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where there is one.")
    tp_size: int = option(1, "Tensor-parallel ranks per replica.")
    pp_size: int = option(1, "Pipeline stages per replica.")
    replicas: int = option(1, "Data-parallel replicas of the whole model.")
    device_ids: tuple[int, ...] | None = option(None, "GPUs to use; default: the first ones.")
    nccl_port: int = option(29500, "First port of the ranks' rendezvous; 16 per replica are used in turn.")
    transport: Transport = option(
        "auto",
        "What a worker is: a process, a thread, or a Ray actor; auto: a thread on Windows, else a process.",
    )
    cpu_threads: int | None = option(None, "Threads that a CPU worker computes with; default: the cores.")


@dataclass(frozen=True, kw_only=True)
class SupervisionConfig:
    """Stopping, restarting and watching."""

    shutdown_timeout: float = option(25.0, "Seconds from the request to stop until the process is gone.")
    max_restarts: int = option(3, "Worker restarts within --restart-period before the engine gives up.")
    restart_period: float = option(1 * MINUTES, "Seconds.")
    start_timeout: float = option(10 * MINUTES, "Seconds that a worker may take to load and warm up.")
    step_timeout: float = option(
        20.0, "Seconds without progress, a layer of the model at least, after which a worker counts as hung."
    )
    health_interval: float = option(5.0, "Seconds between round trips through an idle worker's step loop.")
    standby_workers: int | None = option(
        None, "Spare worker processes per replica, imported and prepared; default: 1 where memory allows."
    )
    faults: str = option("", "A plan of faults to inject, for staging; see docs/fault-injection.md.")


@dataclass(frozen=True, kw_only=True)
class SleepConfig:
    """Giving memory back while there is nothing to do."""

    sleep_after: float | None = option(None, "Seconds of idleness after which the engine falls asleep.")
    sleep_level: int = option(
        1,
        "How deep: 0 pauses, 1 moves weights to host memory and drops KV, 2 drops weights too, "
        "3 ends the worker processes.",
    )
    wake_on_request: bool = option(True, "A request that arrives asleep wakes the engine; else it gets 503.")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ModelConfig, CacheConfig, SchedulerConfig, ParallelConfig, SupervisionConfig, SleepConfig):
    """Everything that an engine needs to know.

    Raises:
        ConfigError: an option that cannot work by itself or beside another; names both.
    """

    log_level: Literal["debug", "info", "warning", "error"] = option("info", "How much is logged.")

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "max_queue",
            "tp_size",
            "pp_size",
            "replicas",
        ):
            _at_least(self, name, 1)
        for name in ("context_len", "num_blocks", "kv_cache_memory", "cpu_threads", "max_admitted_tokens"):
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        if self.cpu_threads is not None and self.cpu_threads > MAX_THREADS:
            raise ConfigError(f"--cpu-threads must be at most {MAX_THREADS}, got {self.cpu_threads}")
        for name in (
            "max_bs",
            "max_num_batched_tokens",
            "shutdown_timeout",
            "max_restarts",
            "steps_ahead",
            "speculate",
            "sleep_level",
        ):
            _at_least(self, name, 0)
        for name in ("restart_period", "start_timeout", "step_timeout", "health_interval", "sleep_after"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{_flag(name)} must be above 0 seconds, got {getattr(self, name)}")
        self._check_combinations()

    def on_device(self, device: str) -> EngineConfig:
        """The same with what depends on the device decided.

        Args:
            device: as in `ullm.protocol.messages.ModelInfo`: ``cpu``, ``cuda:0``.
        """
        usual_bs, usual_tokens = (256, 8192) if device.startswith("cuda") else (64, 512)
        max_bs = self.max_bs or min(usual_bs, self.max_num_batched_tokens or usual_bs)
        tokens = self.max_num_batched_tokens or max(usual_tokens, max_bs)
        return dataclasses.replace(self, max_bs=max_bs, max_num_batched_tokens=tokens)

    @property
    def worker_transport(self) -> Literal["process", "thread", "ray", "fake"]:
        """The transport with ``auto`` decided."""
        if self.transport != "auto":
            return self.transport
        return "thread" if os.name == "nt" and self.world_size == 1 else "process"

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.tp_size * self.pp_size

    def _check_combinations(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.sleep_level > MAX_SLEEP_LEVEL:
            raise ConfigError(f"--sleep-level must be 0, 1, 2 or 3, got {self.sleep_level}")
        if self.standby_workers is not None and self.standby_workers < 0:
            raise ConfigError(f"--standby-workers must be at least 0, got {self.standby_workers}")
        if self.standby_workers and self.worker_transport in ("thread", "ray"):
            raise ConfigError(
                f"--standby-workers {self.standby_workers} needs processes, but the transport is "
                f"{self.worker_transport}; use --transport process"
            )
        if self.steps_ahead > 1:
            raise ConfigError(f"--steps-ahead must be 0 or 1, got {self.steps_ahead}")
        if 0 < self.max_num_batched_tokens < self.max_bs:
            raise ConfigError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is less than --max-bs "
                f"{self.max_bs}: a step could not decode one token for each running sequence; "
                "raise the first or lower the second"
            )
        if self.transport == "thread" and self.world_size > 1:
            raise ConfigError(
                f"--transport thread runs one rank, but --tp-size {self.tp_size} × --pp-size {self.pp_size} "
                "needs more; use --transport process"
            )
        if self.pp_size > 1:
            raise ConfigError("--pp-size above 1 is not supported yet; use --tp-size")
        if self.device_ids is not None and len(self.device_ids) < self.world_size * self.replicas:
            raise ConfigError(
                f"--device-ids names {len(self.device_ids)} devices, but {self.replicas} replica(s) of "
                f"{self.world_size} rank(s) need {self.world_size * self.replicas}"
            )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    api_key: str | None = option(None, "Clients must send it as a bearer token.")
    admin_key: str | None = option(None, "Opens the admin endpoints to those who send it as a bearer token.")
    admin_listen: str | None = option(
        None, "Serve the admin endpoints, without a key, on unix:PATH or on HOST:PORT of loopback."
    )
    sse_keep_alive: float = option(10.0, "Seconds of silence after which a stream gets a comment line.")
    stall_timeout: float = option(
        60.0, "Seconds that a client may leave its stream unread before the request is aborted."
    )
    max_body: int = option(32 << 20, "Most bytes of a request's body; larger ones get 413.")
    cors_origins: tuple[str, ...] = option((), "Origins whose pages may call the API.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, got {self.port}")
        if self.max_body < 1:
            raise ConfigError(f"--max-body must be at least 1 byte, got {self.max_body}")
        for name in ("sse_keep_alive", "stall_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_flag(name)} must be above 0 seconds, got {getattr(self, name)}")
        if self.admin_key == "":
            raise ConfigError("--admin-key is empty; leave it out, or give a key")
        if self.api_key == "":
            raise ConfigError("--api-key is empty; leave it out, or give a key")
        if self.admin_key is not None and self.admin_key == self.api_key:
            raise ConfigError("--admin-key equals --api-key: each client could stop the server; change it")


C = TypeVar("C", EngineConfig, ServerConfig)


def from_env(cls: type[C], environ: Mapping[str, str] = os.environ, **overrides: Any) -> C:
    """Build ``cls`` from ``ULLM_<FIELD>`` variables; ``overrides`` win.

    Lists are separated by commas. Variables that name no field of ``cls`` are ignored, because the
    engine and the server share the prefix.

    Raises:
        ConfigError: a value of the wrong type; names the variable.
    """
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(cls):
        name = f"ULLM_{spec.name.upper()}"
        if name not in environ or spec.name in overrides:
            continue
        text = environ[name]
        value: Any = (
            [part.strip() for part in text.split(",") if part.strip()] if "tuple" in str(spec.type) else text
        )
        try:
            values[spec.name] = msgspec.convert({spec.name: value}, _single(cls, spec.name), strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{name}={text!r}: {str(error).split(' - at')[0]}") from None
    return cls(**{k: getattr(v, k) for k, v in values.items()}, **overrides)


def _single(cls: type[Any], name: str) -> Any:
    """A struct with only the field ``name``, so that a wrong value is blamed on its own variable."""
    import typing

    hints = typing.get_type_hints(cls)
    return msgspec.defstruct(f"Env_{name}", [(name, hints[name])])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least(config: EngineConfig, name: str, least: int) -> None:
    if not getattr(config, name) >= least:
        raise ConfigError(f"{_flag(name)} must be at least {least}, got {getattr(config, name)}")
