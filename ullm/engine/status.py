"""Values that an engine shows of itself to probes, metrics and tests."""

from __future__ import annotations

import msgspec


class ReplicaHealth(msgspec.Struct, frozen=True):
    """The health of one replica.

    Args:
        up: whether it takes requests.
        epoch: incarnation of its worker group; 1 is the first.
        state: ``starting``, ``up``, ``restarting``, ``asleep``, ``waking`` or ``failed``.
        round_trip_age: seconds since the last answer came through the step loop, a step's result or, from
            idle workers, the answer to a ping; None before the first, and asleep.
        round_trip_seconds: duration of that round trip.
        breaker: ``closed``; ``half_open`` after losses in quick succession, while it gets one request at a
            time; ``open`` while it is down after a loss.
        role: ``prefill``, ``decode`` or ``both``; see ``--roles``.
    """

    replica: int
    up: bool
    epoch: int
    worker_pids: list[int]
    state: str = "up"
    round_trip_age: float | None = None
    round_trip_seconds: float | None = None
    breaker: str = "closed"
    role: str = "both"


class SleepHealth(msgspec.Struct, frozen=True):
    """Whether the engine sleeps, and whether it takes requests.

    Args:
        state: ``awake``, ``falling_asleep``, ``asleep`` or ``waking``.
        level: 0 to 3; None while awake.
        registered: whether requests are taken: always while awake, and asleep if they wake the engine.
        seconds: time since the last change of ``state``.
    """

    state: str = "awake"
    level: int | None = None
    registered: bool = True
    seconds: float = 0.0


class ReloadReport(msgspec.Struct, frozen=True):
    """The result of a reload.

    Args:
        model: path of the model that the workers have loaded now.
        seconds: duration, including the end of the old workers.
        resumed: number of requests that were moved to the new workers before they had finished.
    """

    model: str
    revision: str | None
    replicas: list[int]
    seconds: float
    resumed: int


class Health(msgspec.Struct, frozen=True):
    """The health of an engine, as probes report it.

    Args:
        state: ``starting``, ``running``, ``restarting`` (no replica is up), ``sleeping``, ``draining``,
            ``aborting``, ``stopping``, ``stopped`` or ``failed``.
        live: whether the process is worth keeping.
        ready: whether requests are taken now.
        detail: the reason why the engine is not ready; empty if it is.
        hosts: with ``--nnodes``, ``--node-rank`` → name of each other host whose agent is connected.
    """

    state: str
    live: bool
    ready: bool
    detail: str
    replicas: list[ReplicaHealth]
    sleep: SleepHealth = SleepHealth()
    hosts: dict[int, str] = {}


class EngineStatistics(msgspec.Struct, frozen=True):
    """Present sizes, and counts since the start, over all replicas.

    Args:
        running: sequences in the workers' batches.
        waiting: sequences admitted but not yet running.
        requests_total: finish reason → finished choices; ``error`` for failed ones.
        tokens_resubmitted_total: tokens computed again after a loss of workers.
        sleeps_total: sleep level → number of times that the engine fell asleep at it.
        wakes_total: number of times that it woke up.
        last_sleep_seconds, last_wake_seconds: duration of the last change; None before the first.
        bytes_given_back: memory given back by the current sleep; 0 while awake.
        reloads_total: ``succeeded`` and ``failed`` → number of reloads.
        admitted_tokens: prompt and possible output tokens of live requests.
        draft_tokens_total: tokens proposed by speculative decoding.
        accepted_tokens_total: draft tokens that were accepted.
        steps_total: steps scheduled for the present workers since they started.
        standby_prepared, standby_preparing: standby workers that could take over now, and soon.
        standby_taken_total: standby workers that went into service.
        standby_lost_total: standby workers that died.
        loop_hold_seconds: longest time in which the event loop did not look for I/O since the engine runs.
        loop_holds_total: number of such times above 0.1 s.
        requests_routed_total: why choices were given to the replica that they went to → choices: ``session``,
            ``prefix``, ``load`` or ``turn``; choices that are resumed count again.
        handovers_total: how moves of choices with their KV ended → choices: ``moved``; ``ended``: the choice
            did before; or why the KV was not used: ``identity``, ``full``, ``lost``, ``refused`` or ``late``.
        handover_blocks_total, handover_bytes_total: KV that has arrived, on all ranks together.
        handover_seconds_total: time that copying it took, beside the computation.
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
    sleeps_total: dict[int, int] = {}
    wakes_total: int = 0
    last_sleep_seconds: float | None = None
    last_wake_seconds: float | None = None
    bytes_given_back: int = 0
    reloads_total: dict[str, int] = {}
    admitted_tokens: int = 0
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0
    steps_total: int = 0
    standby_prepared: int = 0
    standby_preparing: int = 0
    standby_taken_total: int = 0
    standby_lost_total: int = 0
    loop_hold_seconds: float = 0.0
    loop_holds_total: int = 0
    requests_routed_total: dict[str, int] = {}
    handovers_total: dict[str, int] = {}
    handover_blocks_total: int = 0
    handover_bytes_total: int = 0
    handover_seconds_total: float = 0.0
