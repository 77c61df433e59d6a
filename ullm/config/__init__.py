"""Configuration: one frozen dataclass per concern, each default written once.

An `EngineConfig` *is* each of its concerns, so it reads flat (``config.block_size``) while a
component declares only what it needs (``def __init__(self, config: CacheConfig)``). Command line
flags, ``ULLM_*`` variables and docs/reference/configuration.md are derived from the fields and from the
``help`` of their metadata.

The modules are one subject each; the rest of ullm imports all names from here.
"""

from __future__ import annotations

from ullm.config.batching import CacheConfig, SchedulerConfig
from ullm.config.engine import MAX_PORT, MAX_THREADS, EngineConfig, is_loopback
from ullm.config.lifetime import MAX_SLEEP_LEVEL, SleepConfig, SleepMode, SupervisionConfig
from ullm.config.model import DEFAULT_MODEL, DEFAULT_RUNNER, ModelConfig
from ullm.config.options import GIB, MINUTES, explained, option
from ullm.config.parallel import LINK_FILES, ParallelConfig, Role, Transport
from ullm.config.server import ServerConfig
from ullm.config.tuning import Tuning

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_RUNNER",
    "GIB",
    "LINK_FILES",
    "MAX_PORT",
    "MAX_SLEEP_LEVEL",
    "MAX_THREADS",
    "MINUTES",
    "CacheConfig",
    "EngineConfig",
    "ModelConfig",
    "ParallelConfig",
    "Role",
    "SchedulerConfig",
    "ServerConfig",
    "SleepConfig",
    "SleepMode",
    "SupervisionConfig",
    "Transport",
    "Tuning",
    "explained",
    "is_loopback",
    "option",
]
