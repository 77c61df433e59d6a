"""What an engine says of itself: values for probes, metrics and tests."""

from __future__ import annotations

import msgspec


class ReplicaHealth(msgspec.Struct, frozen=True):
    """One replica.

    Args:
        up: whether it takes requests.
        epoch: incarnation of its worker group; 1 is the first.
    """

    replica: int
    up: bool
    epoch: int
    worker_pids: list[int]


class Health(msgspec.Struct, frozen=True):
    """What the probes answer.

    Args:
        live: the process is worth keeping.
        ready: requests are taken now.
        detail: why not ready; empty if it is.
    """

    state: str
    live: bool
    ready: bool
    detail: str
    replicas: list[ReplicaHealth]


class EngineStatistics(msgspec.Struct, frozen=True):
    """What is inside, and counts since the start; over all replicas.

    Args:
        running: sequences in the workers' batches.
        waiting: sequences admitted and not yet running.
        requests_total: finish reason → ended choices; ``error`` for failed ones.
        tokens_resubmitted_total: tokens computed again after a loss of workers.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    prefix_cache_hit_tokens: int
    prefix_cache_query_tokens: int
    prompt_tokens_total: int
    generation_tokens_total: int
    preemptions_total: int
    requests_total: dict[str, int]
    worker_restarts_total: int
    requests_resumed_total: int
    tokens_resubmitted_total: int
