"""Configuration: one frozen dataclass per concern, each default written once.

An `EngineConfig` *is* each of its concerns, so it reads flat (``config.block_size``) while a
component declares only what it needs (``def __init__(self, config: CacheConfig)``). Command line
flags, ``ULLM_*`` variables and docs/reference/configuration.md are derived from the fields and from the
``help`` of their metadata.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import operator
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import msgspec

from ullm.errors import ConfigError, ResourceUnavailable

MINUTES = 60.0
GIB = 1 << 30
MAX_THREADS = 1024
MAX_SLEEP_LEVEL = 3
MAX_PORT = 65535
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""The embedded default model; see `ullm.hub`."""
DEFAULT_RUNNER = "ullm.model.execution.runner:ModelRunner"

C = TypeVar("C")

SleepMode = Literal["wait", "abort", "keep"]
"""How requests in flight are treated when the engine is put to sleep."""
Transport = Literal["auto", "process", "thread", "ray", "fake"]
Role = Literal["prefill", "decode", "both"]
"""What a replica is for: the prompts of long requests, all tokens after them, or everything."""


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


def explained(cls: type[C]) -> type[C]:
    """Add the meaning of each option to a class's docstring, for `help`; written once, in the fields."""
    if cls.__doc__:  # none with python -OO
        summary, _, rest = cls.__doc__.partition("\n\n")
        entries = (
            textwrap.fill(
                f"{spec.name}: {spec.metadata['help']}",
                100,
                initial_indent=" " * 8,
                subsequent_indent=" " * 12,
                break_on_hyphens=False,
            )
            for spec in dataclasses.fields(cls)  # type: ignore[arg-type]
        )
        arguments = "\n".join(["    Args:", *entries])
        cls.__doc__ = "\n\n".join(part for part in (summary, arguments, rest) if part)
    return cls


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
        "part of the model's name, and the whole of it.",
    )
    chat_template: str | None = option(
        None, "File with a Jinja chat template that replaces the model's; default: the model's own."
    )
    special_tokens_in_text: bool = option(
        True,
        "Let special tokens that users' and tools' messages spell out be those tokens, as transformers does; "
        "if not, they are text, and no message can forge another turn.",
    )
    generation_config: Literal["auto", "vllm"] = option(
        "auto",
        "Sampling parameters of requests that name none; auto: those of the model's generation_config.json, "
        "vllm: the API's defaults.",
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
    verify: bool = option(
        False,
        "Compare a native model with transformers' code on 16 tokens when it is loaded, unless it is large "
        "or a GGUF file, and refuse it if they differ. ullm doctor MODEL does so, too.",
    )
    lora: tuple[str, ...] = option(
        (),
        "LoRA adapters, each as NAME=FOLDER: served under that name beside the model. Several: separate them "
        "by commas, or repeat the option.",
        aliases=("--lora-modules",),
    )
    context_len: int | None = option(
        None,
        "Maximum number of tokens of a prompt and its output together; default: the model's own. The limit "
        "is that, too, or what linear, dynamic or YaRN scaling of its rotary embedding extends it to.",
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
        if names:
            return names
        return tuple(dict.fromkeys((os.path.basename(self.model.rstrip("/")) or self.model, self.model)))

    @property
    def lora_paths(self) -> dict[str, str]:
        """The adapters to start with: name → folder.

        Raises:
            ConfigError: an entry is not NAME=FOLDER, or a name is taken.
        """
        paths = dict[str, str]()
        for entry in self.lora:
            name, _, path = entry.partition("=")
            if not name or not path:
                raise ConfigError(f"--lora {entry!r} must be NAME=FOLDER")
            if name in paths or name in self.model_names:
                other = "another adapter" if name in paths else "the model itself"
                raise ConfigError(f"--lora {entry!r}: {name!r} is the name of {other}; choose a new one")
            paths[name] = path
        return paths

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


LINK_FILES = ("link_certfile", "link_keyfile", "link_ca_file")
"""Options that belong together: connections between hosts are encrypted by them."""


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
        "Number of pipeline stages per replica: each has a part of the layers, in --tp-size ranks.",
        aliases=("--pipeline-parallel-size", "-pp"),
    )
    replicas: int = option(
        1, "Number of data-parallel replicas of the whole model.", aliases=("--data-parallel-size", "-dp")
    )
    routing: Literal["prefix", "least-loaded", "round-robin"] = option(
        "prefix",
        "Which of several replicas a request goes to; prefix: the one with most of its prompt cached, "
        "weighed against the load, least-loaded: that with the fewest requests, round-robin: each in turn.",
    )
    roles: tuple[str, ...] = option(
        (),
        "What each replica is for, one entry each: prefill computes long prompts, decode all else, both "
        "everything. A request whose prompt is computed moves on with its KV. Default: both for all.",
    )
    prefill_threshold: int = option(
        256,
        "With --roles, tokens to compute from which a request goes to a replica for prefill first; shorter "
        "ones, and those whose beginning is cached, are computed where they decode.",
    )
    kv_handover: bool = option(
        True,
        "Copy the KV of requests that move to another replica on purpose, as in a reload; otherwise it is "
        "computed again there.",
    )
    migration_limit: int | None = option(
        None,
        "Number of times that a request goes on after the workers that computed it were lost; after one more "
        "loss it ends with an error. Default: no limit.",
    )
    device_ids: tuple[int, ...] | None = option(
        None,
        "Indices of the GPUs to use, --tp-size × --pp-size for each replica; default: the first ones.",
    )
    nccl_port: int = option(
        0,
        "First port for the rendezvous of a replica's ranks, of which each replica uses 16 in turn; 0: a "
        "free one, which the operating system chooses. With --nnodes: the port at which the engine waits for "
        "the other hosts; 0: 29501.",
        aliases=("--master-port",),
    )
    master_addr: str = option(
        "127.0.0.1",
        "Address at which a replica's ranks meet, one of loopback; with --nnodes, the address of the "
        "engine's host at which it waits for the other hosts.",
    )
    nnodes: int = option(
        1,
        "Number of hosts that share the ranks of all replicas; each runs the same command, with its own "
        "--node-rank.",
    )
    node_rank: int = option(
        0, "Index of this host: 0 has the engine and its server, the others only run workers for it."
    )
    node_secret_file: str | None = option(
        None,
        "File with a secret by which the hosts know each other, at least 16 bytes, the same on all; needed "
        "with --nnodes.",
    )
    link_certfile: str | None = option(
        None,
        "File with this host's certificate for connections between hosts (PEM, with intermediates): those of "
        "--listen HOST:PORT, --connect HOST:PORT and --nnodes are encrypted by TLS, and both ends show a "
        "certificate. Needs --link-keyfile and --link-ca-file.",
    )
    link_keyfile: str | None = option(None, "File with the key of --link-certfile, without a password.")
    link_ca_file: str | None = option(
        None,
        "File with the authority whose certificates are let in over --link-certfile: an own one, since each "
        "certificate of it is.",
    )
    node_timeout: float = option(
        5.0, "Seconds without a sign of life after which a host counts as lost, and its workers with it."
    )
    transport: Transport = option(
        "auto",
        "Kind of worker: process, thread, or ray for a Ray actor (fake: for tests); auto: thread on Windows "
        "with one rank, else process.",
    )
    cpu_threads: int | None = option(
        None,
        "Number of threads that a CPU worker computes with; default: the cores that affinity and the "
        "container's quota leave, rounded up, divided among the ranks of a replica.",
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


@explained
@dataclass(frozen=True, kw_only=True)
class EngineConfig(ModelConfig, CacheConfig, SchedulerConfig, ParallelConfig, SupervisionConfig, SleepConfig):
    """All options of an engine.

    Raises:
        ConfigError: an option that cannot work, alone or together with another; names both.
    """

    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "Least severe level that is logged."
    )
    log_format: Literal["text", "json"] = option(
        "text", "Form of log lines: text, or one JSON object per line with all values."
    )

    def __post_init__(self) -> None:
        _convert_fields(self)
        for name in (
            "block_size",
            "max_queue",
            "tp_size",
            "pp_size",
            "replicas",
            "nnodes",
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
        if self.migration_limit is not None:
            _at_least(self, "migration_limit", 0)
        _at_least(self, "prefill_threshold", 1)
        for name in (
            "restart_period",
            "start_timeout",
            "step_timeout",
            "health_interval",
            "sleep_after",
            "node_timeout",
        ):
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

    @property
    def lead_rank(self) -> int:
        """The rank of a replica that chooses the tokens: the first one of the last stage."""
        return self.tp_size * (self.pp_size - 1)

    def _check_combinations(self) -> None:
        _ = self.lora_paths  # raises for what cannot be served
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
        self._check_roles()
        self._check_link_files()
        self._check_hosts()
        if not 0 <= self.nccl_port <= MAX_PORT:
            raise ConfigError(f"--nccl-port must be between 0 and {MAX_PORT}, got {self.nccl_port}")
        if self.device_ids is not None and self.device == "cpu":
            raise ConfigError("--device-ids has no effect with --device cpu; leave out one of the two")
        workers = -(-self.world_size * self.replicas // self.nnodes)  # of the host that has the most
        if self.device_ids is not None and len(self.device_ids) < workers:
            raise ConfigError(
                f"--device-ids names {len(self.device_ids)} devices, but {self.replicas} replica(s) of "
                f"{self.world_size} rank(s) on {self.nnodes} host(s) need {workers}"
            )

    def role_of(self, slot: int) -> Role:
        """Return what the replica in a slot is for."""
        return cast(Role, self.roles[slot]) if self.roles else "both"

    def _check_roles(self) -> None:
        if not self.roles:
            if self.prefill_threshold != EngineConfig.prefill_threshold:
                raise ConfigError(
                    f"--prefill-threshold {self.prefill_threshold} has no effect without --roles; leave "
                    "it out"
                )
            return
        listed, known = ",".join(self.roles), typing.get_args(Role)
        for role in self.roles:
            if role not in known:
                raise ConfigError(f"--roles {listed}: {role!r} is none of {', '.join(known)}")
        if len(self.roles) != self.replicas:
            raise ConfigError(
                f"--roles {listed} names {len(self.roles)} role(s), but --replicas is {self.replicas}; name "
                "one for each"
            )
        for needed in ("prefill", "decode"):
            if not {needed, "both"} & set(self.roles):
                raise ConfigError(f"--roles {listed} needs a replica with {needed}, or with both")
        if not (self.prefix_cache and self.kv_handover):
            option_name = "--no-kv-handover" if self.prefix_cache else "--no-prefix-cache"
            raise ConfigError(
                f"--roles {listed} moves requests by the prefix cache; leave out {option_name}, or --roles"
            )

    def _check_link_files(self) -> None:
        missing = [name for name in LINK_FILES if getattr(self, name) is None]
        if 0 < len(missing) < len(LINK_FILES):
            given = next(name for name in LINK_FILES if name not in missing)
            raise ConfigError(f"{_flag(given)} needs {_flag(missing[0])}; give all three, or none")

    def _check_hosts(self) -> None:
        workers = self.world_size * self.replicas
        if self.nnodes == 1:
            if self.node_rank:
                raise ConfigError(f"--node-rank {self.node_rank} needs --nnodes, the number of hosts")
            if not is_loopback(self.master_addr):
                raise ConfigError(
                    f"--master-addr {self.master_addr} is not a loopback address, and there is one host; "
                    "use 127.0.0.1, or --nnodes for several"
                )
            return
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"--node-rank {self.node_rank} must be from 0 to {self.nnodes - 1}, since --nnodes is "
                f"{self.nnodes}"
            )
        if self.nnodes > workers:
            raise ConfigError(
                f"--nnodes {self.nnodes}: there are only {workers} worker(s) for them; raise --tp-size, "
                "--pp-size or --replicas"
            )
        if self.node_secret_file is None:
            raise ConfigError(
                "--nnodes needs --node-secret-file: whoever reaches --master-addr could take a host's place"
            )
        if self.worker_transport not in ("process", "fake"):
            raise ConfigError(f"--nnodes needs --transport process, not {self.worker_transport}")


_OF_THE_API = (
    *("host", "port", "uds", "api_key", "api_key_file", "ssl_certfile", "ssl_keyfile", "http2", "admin_key"),
    *(
        "sse_keep_alive",
        "max_choices",
        "max_stop_chars",
        "priority",
        "openai_finish_reasons",
        "strict_fields",
    ),
    *("trust_request_chat_template", "tool_call_parser", "reasoning_parser", "cors_origins"),
    *("engine_timeout", "max_waiting"),
)
_OF_FRONT_ENDS = ("engine_key_file", "engine_timeout", "max_waiting")
_STORED = ("journal", "max_stored_answers", "stored_answer_hours")
_MEANINGLESS: Mapping[str, tuple[str, ...]] = {
    "headless": (*_OF_THE_API, *_STORED),
    "connect": _STORED,
    "answers_listen": (
        *("host", "uds", "api_key", "api_key_file", "ssl_certfile", "ssl_keyfile", "http2", "admin_key"),
        *("access_log", "cors_origins", "allowed_hosts"),
    ),
    "api_server_count": ("engine_key_file",),
}
"""Option → those that have no effect beside it."""
_REMEDY: Mapping[str, str] = {
    "headless": "give it to the front ends",
    "connect": "this front end keeps no answers, so leave it out, or say by --answers where they are kept",
    "answers_listen": "clients do not connect there, so give it to the front ends",
    "api_server_count": "the engine is only for the front ends, so leave it out",
}


@explained
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces.")
    port: int = option(8000, "Port to listen on; 0 picks a free one.")
    uds: str | None = option(
        None,
        "Path of a unix socket to listen on, instead of a host and a port; the umask gives its mode. "
        "Default: none.",
    )
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
    http2: bool = option(
        False, "Speak HTTP/2, too: over TLS where a client asks for it, else by prior knowledge."
    )
    access_log: bool = option(
        False,
        "Log one line per request, at level info: its id, path, status, tokens and seconds; never its texts.",
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
    max_body: int | None = option(
        None,
        "Maximum size of a request's body in bytes; larger ones are refused with status 413. Default: 256 "
        "for each token of the model's context, at least 1 MiB and at most 4 MiB. Bodies larger than "
        "4 MiB are parsed one at a time, each in a process of its own.",
    )
    max_entries: int = option(
        4096,
        "Maximum number of entries of a list in a request: messages, tools, biases, stop tokens. A whole "
        "body may have 16 times as many lists and objects. Token ids of prompts are limited by the context.",
    )
    max_choices: int = option(256, "Maximum number of choices of one request: its prompts, times n.")
    max_stop_chars: int = option(4096, "Maximum number of characters of a request's stop strings together.")
    priority: bool = option(
        True, "Take the priority that requests ask for; otherwise those that ask for one are refused."
    )
    journal: str | None = option(
        None,
        "SQLite file that answers are kept in, those of chats, completions and messages, too, so that they "
        "go on after the end of the process. Default: a file in the cache folder, for answers in the "
        "background only.",
    )
    max_stored_answers: int = option(
        1000, "Number of stored answers that are kept; the oldest that have ended make room."
    )
    stored_answer_hours: float = option(24.0, "Hours for which they are kept.")
    openai_finish_reasons: bool = option(
        False,
        "Answer finish_reason length where it would be timeout or abort, which OpenAI does not have; the "
        "field finish_cause has the cause.",
    )
    trust_request_chat_template: bool = option(
        False,
        "Let requests bring chat templates of their own. They run in a sandbox, with limits of time and "
        "memory.",
    )
    strict_fields: bool = option(
        False,
        "Refuse requests with fields that nobody knows, instead of ignoring them with a warning in the log "
        "and in the header X-Ullm-Ignored-Fields.",
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral", "pythonic"] = option(
        "auto", "How the model writes calls of tools; auto: as its chat template shows."
    )
    reasoning_parser: Literal["auto", "think", "none"] = option(
        "auto",
        "How reasoning is told from the answer: between <think> and </think>, or not at all; auto: if the "
        "chat template knows these tags.",
    )
    pooling: Literal["last", "mean"] = option(
        "last",
        "The hidden states of a prompt that make its vector in /v1/embeddings, if the request does not say.",
    )
    cors_origins: tuple[str, ...] = option(
        (), "Origins whose web pages may call the API, as in https://example.org; default: none."
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Names by which clients may call the API, beside addresses and localhost, as in llm.example.org, "
        "*.example.org or *; others are refused with status 403. Default: none on loopback without API keys, "
        "else all.",
    )
    api_server_count: int = option(
        1,
        "Number of front ends, each a process of its own, on one port; from 2 on they are apart from the "
        "engine, and either is started again without the other.",
        aliases=("-asc",),
    )
    headless: bool = option(False, "Run the engine without the API, for front ends that connect to --listen.")
    listen: str | None = option(
        None,
        "Where a --headless engine listens for front ends: unix:PATH (on Linux also unix:@NAME, which has no "
        "file), for programs of the same user, or HOST:PORT, which needs --engine-key-file.",
    )
    connect: str | None = option(
        None,
        "Serve the API for the engine that listens there, instead of running one: unix:PATH or HOST:PORT.",
    )
    answers: str | None = option(
        None,
        "Where the stored answers of this front end are kept: unix:PATH, the --answers-listen of another. "
        "Default: nowhere; requests for stored answers are refused.",
    )
    answers_listen: str | None = option(
        None,
        "Keep the stored answers of other front ends, instead of serving the API: unix:PATH (on Linux also "
        "unix:@NAME, which has no file), where these say --answers.",
    )
    engine_key_file: str | None = option(
        None,
        "File with the key that an engine and its front ends share, of at least 16 characters. Default: the "
        "variable ULLM_ENGINE_KEY; without either, none, which only unix sockets allow.",
    )
    engine_timeout: float = option(
        5 * MINUTES,
        "Seconds that requests of a front end wait for an engine that is away; then they end with an error, "
        "and new ones are refused with status 503 until it is back.",
    )
    max_waiting: int = option(
        1024,
        "Maximum number of choices that a front end has while its engine is away; further requests are "
        "refused with status 503.",
    )

    def __post_init__(self) -> None:
        _convert_fields(self)
        self._check_front_ends()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, got {self.port}")
        if self.host.startswith("unix:"):
            raise ConfigError(f"--host {self.host}: use --uds {self.host.removeprefix('unix:')}")
        if self.uds is not None and (self.host, self.port) != (ServerConfig.host, ServerConfig.port):
            raise ConfigError(f"--uds {self.uds} takes the place of --host and --port; leave those out")
        if self.uds == "":
            raise ConfigError("--uds is empty; leave it out, or give a path")
        if self.max_body is not None and self.max_body < 1:
            raise ConfigError(f"--max-body must be at least 1 byte, got {self.max_body}")
        for name in ("max_entries", "max_choices", "max_stop_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("sse_keep_alive", "stall_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_flag(name)} must be above 0 seconds, got {getattr(self, name)}")
        for name in self.allowed_hosts:
            if not re.fullmatch(r"\*|(\*\.)?[\w.-]+", name):
                raise ConfigError(f"--allowed-hosts: {name!r} is no name; leave out scheme, port and path")
        if self.max_stored_answers < 1 or not self.stored_answer_hours > 0:
            raise ConfigError("--max-stored-answers and --stored-answer-hours must be above 0")
        if self.admin_key == "":
            raise ConfigError("--admin-key is empty; leave it out, or give a key")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            given, missing = ("cert", "key") if self.ssl_keyfile is None else ("key", "cert")
            raise ConfigError(f"--ssl-{given}file needs --ssl-{missing}file; give both, or neither")
        _check_key("--admin-key", self.admin_key)
        if self.admin_key in self.api_keys:  # reads the file, too, before anything is started
            raise ConfigError("--admin-key equals --api-key: each client could stop the server; change it")

    def _check_front_ends(self) -> None:
        """Check the options about front ends in processes of their own."""
        if self.api_server_count < 1 or self.max_waiting < 1:
            raise ConfigError("--api-server-count and --max-waiting must be at least 1")
        if not self.engine_timeout > 0:
            raise ConfigError(f"--engine-timeout must be above 0 seconds, got {self.engine_timeout}")
        parts = [name for name in ("headless", "connect") if getattr(self, name)]
        if self.api_server_count > 1:
            parts.append("api_server_count")
        if len(parts) > 1:
            raise ConfigError(
                f"{_flag(parts[0])} and {_flag(parts[1])} exclude each other: a process is an engine, a "
                "front end, or starts both"
            )
        if self.headless != (self.listen is not None):
            given, missing = ("headless", "listen") if self.headless else ("listen", "headless")
            raise ConfigError(f"--{given} needs --{missing}, where front ends connect; give both, or neither")
        alone = [
            name
            for name in _OF_FRONT_ENDS
            if not parts and getattr(self, name) != getattr(ServerConfig, name)
        ]
        if alone:
            raise ConfigError(
                f"{_flag(alone[0])} has no effect without front ends of their own; leave it out, or "
                "use --api-server-count or --connect"
            )
        self._check_answers()
        if self.answers_listen is not None:
            parts = ["answers_listen"]
        elif self.answers is not None:
            parts.clear()
        for part, options in _MEANINGLESS.items():
            if part in parts:
                self._check_unset(part, options)

    def _check_answers(self) -> None:
        """Check the options that say which front end keeps the stored answers, and where."""
        given = [name for name in ("answers", "answers_listen") if getattr(self, name) is not None]
        for name in given:
            where = getattr(self, name)
            if not where.removeprefix("unix:").strip("@") or not where.startswith("unix:"):
                raise ConfigError(f"{_flag(name)} {where}: expected unix:PATH")
            if sys.platform == "win32":
                raise ResourceUnavailable(
                    f"{_flag(name)} {where}: no unix sockets on this system; leave it out"
                )
            if where.startswith("unix:@") and sys.platform != "linux":
                raise ResourceUnavailable(
                    f"{_flag(name)} {where}: only Linux has sockets without a file; use unix:PATH"
                )
            if self.connect is None:
                raise ConfigError(f"{_flag(name)} needs --connect: only a front end has others beside it")
        if len(given) > 1:
            raise ConfigError(
                "--answers and --answers-listen exclude each other: answers are kept here, or elsewhere"
            )

    def _check_unset(self, part: str, names: tuple[str, ...]) -> None:
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{_flag(name)} has no effect with {_flag(part)}; {_REMEDY[part]}")

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
        raise ResourceUnavailable(f"--api-key-file {path}: {error.strerror or error}") from None
    except ValueError:  # the text of the error would show bytes of keys
        raise ResourceUnavailable(f"--api-key-file {path}: not UTF-8 text; write one key per line") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ResourceUnavailable(
            f"--api-key-file {path}: no keys; write one per line, or leave the option out"
        )
    for key in keys:
        _check_key(f"--api-key-file {path}", key)
    return keys


_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
"""Field → its type; finding out takes a millisecond."""


def _convert_fields(config: EngineConfig | ServerConfig) -> None:
    """Give each field a value of its own type; numpy's numbers and paths are converted.

    Raises:
        ConfigError: a value of the wrong type; names the option.
    """
    secrets = {spec.name: spec.metadata["secret"] for spec in dataclasses.fields(config)}
    for name, hint in _hints(type(config)).items():
        value = _plain(getattr(config, name))
        try:
            object.__setattr__(config, name, msgspec.convert(value, hint))
        except msgspec.ValidationError:
            shown = f"a {type(value).__name__}" if secrets[name] else repr(value)
            raise ConfigError(f"{_flag(name)} must be {_kind(hint)}, got {shown}") from None


def _plain(value: Any) -> Any:
    """Return a value of another library's type as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple | range):
        return tuple(map(_plain, value))
    for convert in (operator.index, float):
        try:
            return convert(value)
        except (TypeError, ValueError):
            continue
    return value


def _kind(hint: Any) -> str:
    """Return the values that a field takes, in words."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_kind, arguments))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_kind(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    return names.get(hint, "None")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def is_loopback(address: str) -> bool:
    """Return True for an IP address that only this host reaches."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _at_least(config: EngineConfig, name: str, least: int) -> None:
    if not getattr(config, name) >= least:
        raise ConfigError(f"{_flag(name)} must be at least {least}, got {getattr(config, name)}")
