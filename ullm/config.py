"""Configuration: one frozen dataclass per concern, each default written once.

An `EngineConfig` *is* each of its concerns, so it reads flat (``config.block_size``) while a
component declares only what it needs (``def __init__(self, config: CacheConfig)``). Command line
flags, ``ULLM_*`` variables and docs/reference/configuration.md are derived from the fields and from the
``help`` of their metadata.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import msgspec

from ullm.errors import ConfigError

MINUTES = 60.0
GIB = 1 << 30
MAX_THREADS = 1024
MAX_SLEEP_LEVEL = 3
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""The embedded default model; see `ullm.hub`."""
DEFAULT_RUNNER = "ullm.model.execution.runner:ModelRunner"

_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+", re.IGNORECASE)
"""The value of a variable by which Kubernetes tells a pod where a Service is."""

log = logging.getLogger(__name__)

SleepMode = Literal["wait", "abort", "keep"]
"""How requests in flight are treated when the engine is put to sleep."""
Transport = Literal["auto", "process", "thread", "ray", "fake"]


class Tuning(msgspec.Struct, frozen=True):
    """How the CPU kernels divide a product. Every choice gives the same result, bit by bit.

    Args:
        chunk_tiles: tiles of rows that are multiplied by the same weights in turn.
        piece: groups of quantized weights that a thread takes at a time.
        prefetch: whether the next weights are prefetched.
        origin: ``default``, or ``calibrated on`` a date.
        model: the model that it was measured for.
    """

    chunk_tiles: int = 8
    piece: int = 48
    prefetch: bool = True
    origin: str = "default"
    model: str = ""

    def __post_init__(self) -> None:
        if not (1 <= self.chunk_tiles <= 1024 and 1 <= self.piece <= 1024):
            raise ValueError("out of range")

    @property
    def label(self) -> str:
        """What differs from the default."""
        default = Tuning()
        names = ("chunk_tiles", "piece", "prefetch")
        changed = [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) != getattr(default, n)]
        return ", ".join(changed) or "default"


def option(default: Any, help: str, *, aliases: tuple[str, ...] = (), secret: bool = False) -> Any:
    """Return a dataclass field with the help text that the command line and the docs show.

    Args:
        aliases: further names of the flag: those that vLLM gives to the same option.
        secret: no text form of the configuration shows it, no child process gets its variable, and a
            comma is part of the value.
    """
    return field(
        default=default, repr=not secret, metadata={"help": help, "aliases": aliases, "secret": secret}
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, and the precision it computes in."""

    model: str = option(
        DEFAULT_MODEL, "Model to serve: a hub id, a local folder or a .gguf file; the default is embedded."
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a hub model; default: the main branch, or what is cached."
    )
    tokenizer: str | None = option(None, "Folder or hub id of the tokenizer; default: the model's own.")
    served_model_name: str | tuple[str, ...] | None = option(
        None,
        "Names by which the API serves the model; the first one is shown in responses. Default: the last "
        "part of the model's name.",
    )
    chat_template: str | None = option(
        None, "File with a Jinja chat template that replaces the model's; default: the model's own."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Dtype of arithmetic and KV; auto: on a GPU the checkpoint's, on a CPU bfloat16 if fast there, else "
        "float32. The CPU kernels widen weights of 16 bits to float32 as they multiply.",
    )
    quantization: Literal["auto", "none", "int8", "int4"] = option(
        "auto",
        "Precision of the weights on a CPU: int8 and int4 quantize them while loading, none dequantizes "
        "them; auto: as stored in the checkpoint.",
    )
    context_len: int | None = option(
        None,
        "Maximum number of tokens of a prompt and its output together; default, and limit: the model's own.",
        aliases=("--max-model-len",),
    )
    load_format: Literal["auto", "dummy"] = option(
        "auto",
        "Source of the weights; auto: the checkpoint's files, dummy: random weights of the same shapes.",
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")
    enforce_eager: bool = option(False, "Do not capture CUDA graphs.")
    cpu_kernels: bool = option(True, "Compile fused kernels for the CPU where a C++ compiler is found.")
    cpu_calibration: bool = option(
        True,
        "Use what was measured for the CPU kernels on this machine; if nothing was, measure it beside the "
        "first start of a process that serves.",
    )
    gpu_kernels: bool = option(
        True, "Compile fused kernels for CUDA where Triton works and agrees with PyTorch."
    )
    runner: str = option(
        DEFAULT_RUNNER,
        "Class that workers run, as module:class; for tests and experiments.",
    )

    @property
    def calibrates_kernels(self) -> bool:
        """Whether measurements of the CPU kernels are of use; other runners have none."""
        return self.cpu_kernels and self.cpu_calibration and self.runner == DEFAULT_RUNNER

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names by which the API serves the model, at least one."""
        names = self.served_model_name
        if isinstance(names, str):
            names = (names,)
        return names or (os.path.basename(self.model.rstrip("/")) or self.model,)

    @property
    def model_name(self) -> str:
        """The name that responses and logs show."""
        return self.model_names[0]


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


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Ranks and replicas, and where they run."""

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Device that the model runs on; auto: cuda where a GPU is found, else cpu."
    )
    tp_size: int = option(
        1, "Number of tensor-parallel ranks per replica.", aliases=("--tensor-parallel-size", "-tp")
    )
    pp_size: int = option(
        1,
        "Number of pipeline stages per replica; only 1 is supported.",
        aliases=("--pipeline-parallel-size", "-pp"),
    )
    replicas: int = option(
        1, "Number of data-parallel replicas of the whole model.", aliases=("--data-parallel-size", "-dp")
    )
    device_ids: tuple[int, ...] | None = option(
        None, "Indices of the GPUs to use, --tp-size of them for each replica; default: the first ones."
    )
    nccl_port: int = option(
        29500, "First port for the rendezvous of a replica's ranks; each replica uses 16 ports in turn."
    )
    transport: Transport = option(
        "auto",
        "Kind of worker: process, thread, or ray for a Ray actor (fake: for tests); auto: thread on Windows "
        "with one rank, else process.",
    )
    cpu_threads: int | None = option(
        None,
        "Number of threads that a CPU worker computes with; default: the cores that affinity and the "
        "container's quota leave, rounded up.",
    )


@dataclass(frozen=True, kw_only=True)
class SupervisionConfig:
    """Stopping, restarting and watching."""

    shutdown_timeout: float = option(
        25.0, "Seconds from a request to stop until the process has ended; requests may finish in that time."
    )
    max_restarts: int = option(
        3, "Number of worker restarts within --restart-period after which the engine gives up."
    )
    restart_period: float = option(1 * MINUTES, "Seconds over which --max-restarts counts.")
    start_timeout: float = option(
        10 * MINUTES, "Seconds that a worker may take to load the model and warm up."
    )
    step_timeout: float = option(
        20.0, "Seconds without progress, not even a layer of the model, after which a worker counts as hung."
    )
    health_interval: float = option(5.0, "Seconds between round trips through an idle worker's step loop.")
    standby_workers: int | None = option(
        None,
        "Number of standby worker processes per replica, imported and prepared; default: 1 where memory "
        "allows, else 0.",
    )
    faults: str = option(
        "", "Plan of faults to inject, for staging; see docs/how-to/fault-injection.md. Default: none."
    )


@dataclass(frozen=True, kw_only=True)
class SleepConfig:
    """Releasing memory while there is nothing to do."""

    sleep_after: float | None = option(
        None, "Seconds of idleness after which the engine falls asleep; default: never."
    )
    sleep_level: int = option(
        1,
        "Depth of that sleep: 0 pauses, 1 moves weights to host memory and drops the KV cache, 2 drops the "
        "weights, too, 3 ends the worker processes.",
    )
    wake_on_request: bool = option(
        True,
        "Wake the engine for a request that arrives during sleep, instead of refusing it with status 503.",
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ModelConfig, CacheConfig, SchedulerConfig, ParallelConfig, SupervisionConfig, SleepConfig):
    """All options of an engine.

    Raises:
        ConfigError: an option that cannot work, alone or together with another; names both.
    """

    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "Least severe level that is logged."
    )

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
        """Return a copy in which the defaults that depend on the device are filled in.

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

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces.")
    port: int = option(8000, "Port to listen on; 0 picks a free one.")
    api_key: str | tuple[str, ...] | None = option(
        None,
        "Key that clients must send, as a bearer token or in X-Api-Key; several: repeat the option. Other "
        "users of the machine see the command line, but neither variables nor --api-key-file. Default: none "
        "is needed.",
        secret=True,
    )
    api_key_file: str | None = option(
        None, "File of further such keys, one per line; blank lines and lines that begin with # are ignored."
    )
    ssl_certfile: str | None = option(
        None,
        "PEM file of the certificate, with its chain, by which the API is served over TLS; needs "
        "--ssl-keyfile. Default: plain HTTP.",
    )
    ssl_keyfile: str | None = option(
        None, "PEM file of the certificate's private key, without a password; needs --ssl-certfile."
    )
    admin_key: str | None = option(
        None,
        "Key that opens the admin endpoints on the API's port to those who send it as a bearer token; "
        "default: they are closed there.",
        secret=True,
    )
    admin_listen: str | None = option(
        None,
        "Where to serve the admin endpoints without a key: unix:PATH, or HOST:PORT of loopback; default: "
        "nowhere.",
    )
    sse_keep_alive: float = option(
        10.0, "Seconds of silence after which a comment line is sent on a stream of server-sent events."
    )
    stall_timeout: float = option(
        60.0, "Seconds that a client may leave its stream unread before the request is aborted."
    )
    max_body: int = option(
        32 << 20, "Maximum size of a request's body in bytes; larger ones are refused with status 413."
    )
    cors_origins: tuple[str, ...] = option(
        (), "Origins whose web pages may call the API, as in https://example.org; default: none."
    )

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
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            given, missing = ("cert", "key") if self.ssl_keyfile is None else ("key", "cert")
            raise ConfigError(f"--ssl-{given}file needs --ssl-{missing}file; give both, or neither")
        _check_key("--admin-key", self.admin_key)
        if self.admin_key in self.api_keys:  # reads the file, too, before anything is started
            raise ConfigError("--admin-key equals --api-key: each client could stop the server; change it")

    @cached_property
    def api_keys(self) -> tuple[str, ...]:
        """All API keys, those of the file as they were when this was made; none: everybody is let in.

        Raises:
            ConfigError: a key that no client could send, or a file that has none; does not show keys.
        """
        given = self.api_key
        keys = (given,) if isinstance(given, str) else given or ()
        for key in keys:
            _check_key("--api-key", key)
        return keys if self.api_key_file is None else keys + _keys_in(self.api_key_file)


def _check_key(option_name: str, key: str | None) -> None:
    if key == "":
        raise ConfigError(f"{option_name} is empty; leave it out, or give a key")
    if key is not None and not (key == key.strip() and key.isprintable()):
        raise ConfigError(
            f"{option_name}: the key begins or ends with white space, or has control characters, and no "
            "header can carry that; remove them"
        )


def _keys_in(path: str) -> tuple[str, ...]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise ConfigError(f"--api-key-file {path}: {error.strerror or error}") from None
    except ValueError:  # the text of the error would show bytes of keys
        raise ConfigError(f"--api-key-file {path}: not UTF-8 text; write one key per line") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path}: no keys; write one per line, or leave the option out")
    for key in keys:
        _check_key(f"--api-key-file {path}", key)
    return keys


C = TypeVar("C", EngineConfig, ServerConfig)


def from_env(cls: type[C], environ: Mapping[str, str] = os.environ, **overrides: Any) -> C:
    """Build ``cls`` from ``ULLM_<FIELD>`` variables; ``overrides`` win.

    Lists are separated by commas, but a secret is one value. An empty variable counts as unset. Variables
    that name no field of ``cls`` are ignored, because the engine and the server share the prefix. So are
    those that Kubernetes sets for a Service called ullm, as in ``ULLM_PORT=tcp://10.96.12.7:8000``; a log
    line says so.

    Raises:
        ConfigError: a value of the wrong type; names the variable.
    """
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(cls):
        name = f"ULLM_{spec.name.upper()}"
        text = environ.get(name, "")
        if not text or spec.name in overrides:
            continue
        if _SERVICE_LINK.fullmatch(text) and not spec.metadata["secret"]:
            log.warning(
                "%s=%s ignored: Kubernetes sets it for a Service; enableServiceLinks: false in the pod's "
                "spec avoids that",
                name,
                text,
            )
            continue
        lists = "tuple" in str(spec.type) and not spec.metadata["secret"]
        value: Any = [part.strip() for part in text.split(",") if part.strip()] if lists else text
        try:
            values[spec.name] = msgspec.convert({spec.name: value}, _single(cls, spec.name), strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{name}={text!r}: {str(error).split(' - at')[0]}") from None
    return cls(**{k: getattr(v, k) for k, v in values.items()}, **overrides)


def _single(cls: type[Any], name: str) -> Any:
    """Return a struct with only the field ``name``, so that an error is about this variable."""
    import typing

    hints = typing.get_type_hints(cls)
    return msgspec.defstruct(f"Env_{name}", [(name, hints[name])])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least(config: EngineConfig, name: str, least: int) -> None:
    if not getattr(config, name) >= least:
        raise ConfigError(f"{_flag(name)} must be at least {least}, got {getattr(config, name)}")
