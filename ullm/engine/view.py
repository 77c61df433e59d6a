"""What an engine shows of itself to probes and metrics, collected when it is asked."""

from __future__ import annotations

from ullm.engine.lifecycle import AWAKE
from ullm.engine.reload import Reloader
from ullm.engine.replica import Replica
from ullm.engine.state import EngineState
from ullm.engine.status import EngineStatistics, Health, ReplicaHealth
from ullm.engine.tree import EngineParts

_NOT_READY = {
    "restarting": "no replica is up",
    "sleeping": "asleep, and started with --no-wake-on-request",
}


class EngineView:
    """Collects an engine's health, statistics and description from its parts."""

    def __init__(self, parts: EngineParts, reloader: Reloader) -> None:
        self._parts = parts
        self._reloader = reloader

    def health(self) -> Health:
        """Return what the probes answer."""
        life, sleep = self._parts.life, self._parts.lifecycle.health()
        running, up = life.state is EngineState.RUNNING, bool(self._parts.router.replicas_up)
        state = life.state.value
        if running:
            state = "sleeping" if sleep.state != AWAKE else "running" if up else "restarting"
        ready = running and sleep.registered and (up or sleep.state != AWAKE)
        return Health(
            state=state,
            live=life.failure is None,
            ready=ready,
            detail="" if ready else life.failure or _NOT_READY.get(state, state),
            replicas=[self._health(replica) for replica in self._parts.fleet.replicas],
            sleep=sleep,
            hosts=self._parts.hosts.connected() if self._parts.hosts is not None else {},
        )

    def _health(self, replica: Replica) -> ReplicaHealth:
        return replica.health(self._state(replica), self._parts.router.breaker_state(replica.index))

    def _state(self, replica: Replica) -> str:
        """Return a replica's state; see `ReplicaHealth`."""
        if replica.failure is not None:
            return "failed"
        if self._parts.lifecycle.state != AWAKE:
            return self._parts.lifecycle.state
        if replica.index in self._parts.router.replicas_up:
            return "up"
        return "starting" if self._parts.life.state is EngineState.STARTING else "restarting"

    def statistics(self) -> EngineStatistics:
        """Return counts and sizes over all replicas."""
        fleet, lifecycle = self._parts.fleet, self._parts.lifecycle
        router, standbys = self._parts.router.statistics(), fleet.standbys()
        candidates = (replica.scheduler.statistics() for replica in fleet.replicas)
        schedulers = [statistics for statistics in candidates if statistics is not None]
        running = sum(each.running for each in schedulers)
        return EngineStatistics(
            running=running,
            waiting=max(0, router.live - running),
            kv_blocks_used=sum(each.blocks_used for each in schedulers),
            kv_blocks_total=sum(each.blocks_total for each in schedulers),
            prefix_cache_hit_tokens=sum(each.prefix_hits for each in schedulers),
            prefix_cache_query_tokens=sum(each.prefix_queries for each in schedulers),
            prompt_tokens_total=router.prompt_tokens,
            generation_tokens_total=router.generated_tokens,
            preemptions_total=sum(each.preemptions for each in schedulers),
            requests_total=router.finished,
            worker_restarts_total=fleet.restarts,
            requests_resumed_total=router.resumed,
            tokens_resubmitted_total=router.resumed_tokens,
            sleeps_total=dict(lifecycle.sleeps),
            wakes_total=lifecycle.wakes,
            last_sleep_seconds=lifecycle.sleep_seconds,
            last_wake_seconds=lifecycle.wake_seconds,
            bytes_given_back=lifecycle.given_back,
            reloads_total=dict(self._reloader.counts),
            admitted_tokens=router.admitted_tokens,
            draft_tokens_total=sum(each.draft_tokens for each in schedulers),
            steps_total=sum(each.steps for each in schedulers),
            accepted_tokens_total=sum(each.accepted_tokens for each in schedulers),
            standby_prepared=standbys.prepared,
            standby_preparing=standbys.preparing,
            standby_taken_total=standbys.taken_total,
            standby_lost_total=standbys.lost_total,
            loop_hold_seconds=self._parts.loop_holds.longest,
            loop_holds_total=self._parts.loop_holds.long,
            requests_routed_total=router.routed,
            handovers_total=router.handovers.outcomes,
            handover_blocks_total=router.handovers.blocks,
            handover_bytes_total=router.handovers.bytes,
            handover_seconds_total=router.handovers.seconds,
        )
