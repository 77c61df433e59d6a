"""All options of an engine, and which of them cannot be together."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import typing
from dataclasses import dataclass
from typing import Literal, cast

from ullm.config.batching import CacheConfig, SchedulerConfig
from ullm.config.lifetime import MAX_SLEEP_LEVEL, SleepConfig, SupervisionConfig
from ullm.config.model import ModelConfig
from ullm.config.options import explained, option
from ullm.config.parallel import LINK_FILES, ParallelConfig, Role
from ullm.config.values import at_least, convert_fields, flag
from ullm.errors import ConfigError

MAX_THREADS = 1024
MAX_PORT = 65535


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
        convert_fields(self)
        for name in (
            "block_size",
            "max_queue",
            "tp_size",
            "pp_size",
            "replicas",
            "nnodes",
        ):
            at_least(self, name, 1)
        for name in ("context_len", "num_blocks", "kv_cache_memory", "cpu_threads", "max_admitted_tokens"):
            if getattr(self, name) is not None:
                at_least(self, name, 1)
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
            at_least(self, name, 0)
        if self.migration_limit is not None:
            at_least(self, "migration_limit", 0)
        at_least(self, "prefill_threshold", 1)
        for name in (
            "restart_period",
            "start_timeout",
            "step_timeout",
            "health_interval",
            "sleep_after",
            "node_timeout",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{flag(name)} must be above 0 seconds, got {getattr(self, name)}")
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
            raise ConfigError(f"{flag(given)} needs {flag(missing[0])}; give all three, or none")

    def _check_hosts(self) -> None:
        workers = self.world_size * self.replicas
        if self.nnodes == 1:
            if self.node_rank:
                raise ConfigError(f"--node-rank {self.node_rank} needs --nnodes, the number of hosts")
            for name in ("node_secret_file", "node_timeout"):
                if getattr(self, name) != getattr(EngineConfig, name):
                    raise ConfigError(f"{flag(name)} has no effect without --nnodes; leave it out")
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


def is_loopback(address: str) -> bool:
    """Return True for an IP address that only this host reaches."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
