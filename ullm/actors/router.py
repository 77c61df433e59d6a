"""The router: the only owner of the state that must survive. It picks a replica, and resumes after a loss.

Readers and the engine call its synchronous methods; schedulers send to its mailbox. Should its task fail,
the records are still here, and the restarted task submits them again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from ullm.actors.handover import Handover, Handovers
from ullm.actors.request_table import RequestTable
from ullm.actors.router_messages import (
    ReplicaDown,
    ReplicaUp,
    RouterMessage,
    RouterStatistics,
    Tokens,
    Unsendable,
)
from ullm.config import EngineConfig
from ullm.errors import (
    AdapterUnusable,
    GrammarTooComplex,
    MigrationLimitReached,
    NoTokenAllowed,
    RequestPoisoned,
    RequestTooLarge,
)
from ullm.faults import FaultInjector
from ullm.logs import get_logger
from ullm.scheduling.admission_limits import AdmissionLimits
from ullm.scheduling.assignment import assign, is_culprit
from ullm.scheduling.breaker import Breaker, BreakerState
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.routing import ReplicaLoad, Routing
from ullm.scheduling.sequence import FinishReason
from ullm.scheduling.turns import Turns
from ullm.supervision.actor import Mailbox

log = get_logger(__name__)


class _Replica(ReplicaLoad):
    """A replica that is up: its scheduler, and the requests that it has."""

    def __init__(self, up: ReplicaUp, breaker: Breaker) -> None:
        super().__init__(index=up.replica, max_bs=up.max_bs, breaker=breaker, role=up.role)
        self.up = up


class Router(RequestTable):
    """The actor that moves requests between replicas; the records themselves are in `RequestTable`.

    Args:
        config: batch size, replicas and limits, which bound how many requests are admitted.
        faults: faults to inject at the point ``router.tokens``.
    """

    def __init__(self, config: EngineConfig, faults: FaultInjector | None = None) -> None:
        super().__init__()
        self.mailbox: Mailbox[RouterMessage] = Mailbox(float("inf"), "router")
        self._faults = faults or FaultInjector()
        self._faults.find_request = self._find_request
        self._limits = AdmissionLimits(config)
        self._turns = Turns()
        # With one replica there is nothing to choose, and without a cache nothing to find: nothing is hashed.
        by_prefix = config.routing == "prefix" and (config.replicas == 1 or not config.prefix_cache)
        self._routing = Routing("least-loaded" if by_prefix else config.routing, config.prefill_threshold)
        self._handovers = Handovers(self._faults, self._arrive)
        self._hands_over = config.kv_handover and config.prefix_cache
        self._migration_limit = config.migration_limit
        self._breakers: dict[int, Breaker] = {}
        self._replicas: dict[int, _Replica] = {}
        self._retired: set[int] = set()
        self._finished: dict[str, int] = {}
        self._prompt_tokens = self._generated_tokens = self._resumed = self._resumed_tokens = 0

    # --- for readers and the engine ------------------------------------------------------------------

    def check_room(self, choices: int = 1, tokens: int = 0) -> None:
        """Raise unless ``choices`` more choices fit, with ``tokens`` tokens of prompt and possible output.

        Raises:
            QueueFull, TooManyTokens: there is no room now.
            InvalidParameter: they can never fit.
        """
        self._limits.check(len(self._records), choices, tokens)

    def submit(self, record: RequestRecord) -> None:
        """Admit a request; its reader is notified of everything that happens to it."""
        record.turn = self._turns.take(record.client)
        self._insert(record)
        self._prompt_tokens += len(record.prompt_token_ids)
        self._limits.tokens += record.max_total
        self._assign()
        self.announce_change()

    def finish(self, seq_id: int, reason: FinishReason) -> bool:
        """End a request early with the tokens that it has; return False if it has ended already."""
        record = self._records.get(seq_id)
        if record is None:
            return False
        self._withdraw(record)
        self._close(record, reason)
        record.finish(reason)
        self._assign()
        return True

    def finish_all(self, reason: FinishReason) -> int:
        """End every request with the tokens that it has; return their number."""
        return sum(self.finish(seq_id, reason) for seq_id in list(self._records))

    def finish_old(self, reason: FinishReason) -> int:
        """End every request that arrived before `hold`; return their number."""
        old = [record.seq_id for record in self._records.values() if record.arrival <= self._last_arrival]
        return sum(self.finish(seq_id, reason) for seq_id in old)

    def fail_all(self, error: Callable[[], Exception]) -> int:
        """End every request with an error of its own; return their number."""
        records = list(self._records.values())
        for record in records:
            self._fail(record, error())
        return len(records)

    def release(self) -> None:
        """End `hold`."""
        super().release()
        self._assign()

    def retire(self, replica: int, *, retired: bool = True) -> None:
        """Assign no more requests to a replica; those that it has run to their end."""
        (self._retired.add if retired else self._retired.discard)(replica)
        self._assign()

    async def hand_over(self, replica: int) -> None:
        """Move what a retired replica computes to others, with its KV, as far as that is possible.

        Return when each request has moved or cannot, or after `ullm.protocol.stop_budget.HANDOVER` seconds.
        """
        leaving = self._replicas.get(replica)
        if leaving is None or not self._hands_over:
            return
        for record in list(leaving.requests.values()):
            if record.seq_id not in leaving.prefilling:
                self._move_on(record, leaving)
        await self._handovers.settle(replica)

    async def settle(self, replica: int) -> None:
        """Wait until no KV is on its way from a replica, as long as `hand_over` does at most."""
        await self._handovers.settle(replica)

    def load(self, replica: int) -> int:
        """Return the number of choices that a replica has."""
        return len(self._replicas[replica].requests) if replica in self._replicas else 0

    def breaker_state(self, replica: int) -> BreakerState:
        """Return the state of a replica's breaker."""
        breaker = self._breakers.get(replica)
        return "closed" if breaker is None else breaker.state(trio.current_time())

    @property
    def replicas_up(self) -> frozenset[int]:
        """Replicas that take requests."""
        return frozenset(self._replicas)

    def statistics(self) -> RouterStatistics:
        """Return what is in the router as a frozen value."""
        return RouterStatistics(
            live=len(self._records),
            unassigned=len(self._waiting),
            replicas_up=len(self._replicas),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished=dict(self._finished),
            resumed=self._resumed,
            resumed_tokens=self._resumed_tokens,
            admitted_tokens=self._limits.tokens,
            routed=dict(self._routing.reasons),
            handovers=self._handovers.statistics(),
        )

    # --- the supervised child --------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Handle messages of schedulers; first submit every request again, in case this is a restart."""
        for record in list(self._records.values()):
            self._withdraw(record)
            self._requeue(record)
        self._assign()
        async with self._handovers.open():
            task_status.started()
            async for message in self.mailbox:
                await self._handle(message)

    async def _handle(self, message: RouterMessage) -> None:
        match message:
            case Tokens():
                await self._faults.at("router.tokens", tokens=partial(self._concerned, message))
                self._take_tokens(message)
            case Unsendable(seq_id, cause):
                self._refuse(seq_id, cause)
            case ReplicaUp():
                self._add_replica(message)
                self._limits.set_batch_size(message.max_bs)
                self._assign()
                self._move_all_on()
                self.announce_change()
            case ReplicaDown():
                self._lose_replica(message)
                self.announce_change()

    def _find_request(self, seq_id: int) -> tuple[str, int] | None:
        """Return id and prompt tokens of a request, for faults that are tied to one."""
        record = self._records.get(seq_id)
        return None if record is None else (record.request_id, len(record.prompt_token_ids))

    def _concerned(self, tokens: Tokens) -> list[tuple[str, int, int]]:
        """Return which tokens of which requests have come."""
        found = []
        for event in tokens.events:
            if (record := self._records.get(event.seq_id)) is not None:
                before = len(record.token_ids)
                found.append((record.request_id, before + 1, before + len(event.token_ids)))
        return found

    def _add_replica(self, up: ReplicaUp) -> None:
        breaker = self._breakers.setdefault(up.replica, Breaker())
        breaker.up(trio.current_time())
        replica = self._replicas[up.replica] = _Replica(up, breaker)
        if self._routing.index is not None and up.pool is not None:
            replica.blocks = up.pool.listener = self._routing.index.join()
            self._routing.block_size = up.block_size

    def _take_tokens(self, tokens: Tokens) -> None:
        replica = self._replicas.get(tokens.replica)
        if replica is None or replica.up.incarnation != tokens.incarnation:
            return  # a late message of a dead incarnation
        now = trio.current_time()
        for event in tokens.events:
            record = replica.requests.get(event.seq_id)
            if record is None:
                continue
            if event.error and event.lacks_adapter:
                log.warning("adapter cannot be loaded", request=record.request_id, cause=event.error)
                self._fail(record, AdapterUnusable(event.error))
                continue
            if event.error:
                log.warning("request failed in its grammar", request=record.request_id, cause=event.error)
                self._fail(record, _constraint_error(event.error))
                continue
            has_begun = bool(event.token_ids) and event.seq_id in replica.prefilling
            if event.token_ids:
                replica.has_begun(event.seq_id)
            if not record.token_ids:
                self._turns.served(record.turn)
            self._generated_tokens += record.take(event, now)
            if event.finish_reason is not None:
                replica.remove(record.seq_id)
                replica.breaker.served()
                self._close(record, event.finish_reason)
            elif has_begun and replica.role == "prefill":
                self._move_on(record, replica)
        self._assign()

    def _refuse(self, seq_id: int, cause: str) -> None:
        """Fail a request that cannot be sent; its number is new after each loss, so none is mistaken."""
        record = self._records.get(seq_id)
        if record is not None:
            log.warning("request cannot be sent to a worker", request=record.request_id, cause=cause)
            self._fail(record, RequestTooLarge(f"the request cannot be sent to a worker: {cause}"))
            self._assign()

    def _lose_replica(self, down: ReplicaDown) -> None:
        replica = self._replicas.get(down.replica)
        if replica is None or replica.up.incarnation != down.incarnation:
            return
        self._drop_replica(replica, crashed=down.crashed)
        for seq_id, record in replica.requests.items():
            error = self._note_loss(record, seq_id, down.in_step) if down.crashed else None
            self._requeue(record)
            if error is not None:
                log.error("request given up", request=record.request_id, cause=str(error))
                self._fail(record, error)
        write = log.warning if down.crashed else log.info
        write(
            "replica down",
            replica=down.replica,
            scheduler_incarnation=down.incarnation,
            requests=len(replica.requests),
        )
        self._assign()

    def _drop_replica(self, replica: _Replica, *, crashed: bool) -> None:
        index = replica.index
        del self._replicas[index]
        if self._routing.index is not None and replica.blocks is not None:
            assert replica.up.pool is not None, "there are no blocks to follow without a pool"
            replica.up.pool.listener = None
            self._routing.index.leave(replica.blocks)
        if crashed:
            self._breakers[index].lost(trio.current_time())
        else:  # it was asked to stop, and may start anew
            del self._breakers[index]

    def _note_loss(self, record: RequestRecord, seq_id: int, in_step: frozenset[int]) -> Exception | None:
        """Count the loss of the replica that had a request; return why the request is given up, if it is."""
        record.crashes += seq_id in in_step
        record.migrations += seq_id in in_step or bool(record.token_ids)
        if is_culprit(record, in_step):
            return RequestPoisoned(record.request_id, record.crashes)
        if self._migration_limit is not None and record.migrations > self._migration_limit:
            return MigrationLimitReached(record.migrations, self._migration_limit)
        return None

    # --- moving requests -------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Carry out what `assign` decides about waiting requests."""
        if not self._waiting:
            return
        replicas = [replica for index, replica in self._replicas.items() if index not in self._retired]
        assignment = assign(self._waiting.values(), replicas, self._last_arrival)
        for vacated in assignment.vacated:
            for record in list(vacated.requests.values()):
                self._withdraw(record)
                self._requeue(record)
        for record, replica in assignment.alone:
            self._give(record, replica)
        if assignment.open:
            now = trio.current_time()
            for record in assignment.queue:
                self._give(record, *self._routing.choose(record, assignment.open, now))

    def _move_on(self, record: RequestRecord, replica: _Replica) -> None:
        """Have a request with a computed prompt move on to a replica that decodes, if there is one."""
        if record.params.needs_all_positions or record.is_suspect:
            return  # it could not use the cache, or must stay alone
        others = [
            other
            for index, other in self._replicas.items()
            if index not in self._retired and other is not replica
        ]
        target = self._routing.next_home(record, others, trio.current_time())
        if target is not None:
            self._handovers.begin(record, replica.up, target.up)

    def _move_all_on(self) -> None:
        """Have those move on that had nowhere to go when their prompt was computed."""
        for replica in [each for each in self._replicas.values() if each.role == "prefill"]:
            for record in list(replica.requests.values()):
                if record.seq_id not in replica.prefilling:
                    self._move_on(record, replica)

    def _arrive(self, handover: Handover) -> bool:
        """Give a request to the replica that has its KV now; return False if either has left meanwhile."""
        record, target = handover.record, self._replicas.get(handover.target.replica)
        if target is None or target.up is not handover.target or target.index in self._retired:
            return False
        self._withdraw(record)
        self._requeue(record)
        if record.session:
            self._routing.remember(record.session, target.index)
        self._give(record, target, handover.blocks, resumed=False)
        self._assign()
        return True

    def _give(
        self, record: RequestRecord, replica: _Replica, cached_blocks: int = 0, *, resumed: bool = True
    ) -> None:
        if resumed and (record.token_ids or record.crashes):
            self._resumed += 1
            self._resumed_tokens += len(record.prompt_token_ids) + len(record.token_ids)
        record.replica = replica.up.replica
        record.resumed_at = len(record.token_ids)
        del self._waiting[record.seq_id]
        replica.add(record, cached_blocks, self._routing.block_size)
        replica.up.scheduler.submit(record)

    def _withdraw(self, record: RequestRecord) -> None:
        replica = self._replicas.get(record.replica) if record.replica is not None else None
        if replica is not None:
            replica.up.scheduler.abort(record.seq_id)
            replica.remove(record.seq_id)

    def _fail(self, record: RequestRecord, error: Exception) -> None:
        self._withdraw(record)
        self._close(record, "error")
        record.fail(error)

    def _close(self, record: RequestRecord, reason: str) -> None:
        self._finished[reason] = self._finished.get(reason, 0) + 1
        self._limits.tokens -= record.max_total
        self._remove(record)


def _constraint_error(cause: str) -> Exception:
    """Return the error of a request whose constraints let it go no further."""
    return NoTokenAllowed() if cause == NoTokenAllowed.CAUSE else GrammarTooComplex(cause)
