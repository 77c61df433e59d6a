"""The router: the only owner of the state that must survive. It picks a replica, and resumes after a loss.

Readers and the engine call its synchronous methods; schedulers send to its mailbox. Should its task fail,
the records are still here, and the restarted task submits them again.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from ullm.actors.request_table import RequestTable
from ullm.actors.router_messages import ReplicaDown, ReplicaUp, RouterMessage, RouterStatistics, Tokens
from ullm.config import EngineConfig
from ullm.errors import RequestPoisoned
from ullm.faults import FaultInjector
from ullm.logs import get_logger
from ullm.scheduling.admission_limits import AdmissionLimits
from ullm.scheduling.assignment import ReplicaLoad, assign, is_culprit
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import FinishReason
from ullm.supervision.actor import Mailbox

log = get_logger(__name__)


class _Replica(ReplicaLoad):
    """A replica that is up: its scheduler, and the requests that it has."""

    def __init__(self, up: ReplicaUp) -> None:
        super().__init__()
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
        self._limits = AdmissionLimits(config)
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

    def load(self, replica: int) -> int:
        """Return the number of choices that a replica has."""
        return len(self._replicas[replica].requests) if replica in self._replicas else 0

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
        )

    # --- the supervised child --------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Handle messages of schedulers; first submit every request again, in case this is a restart."""
        for record in list(self._records.values()):
            self._withdraw(record)
            self._requeue(record)
        self._assign()
        task_status.started()
        async for message in self.mailbox:
            match message:
                case Tokens():
                    await self._faults.at("router.tokens")
                    self._take_tokens(message)
                case ReplicaUp():
                    self._replicas[message.replica] = _Replica(message)
                    self._limits.set_batch_size(message.max_bs)
                    self._assign()
                    self.announce_change()
                case ReplicaDown():
                    self._lose_replica(message)
                    self.announce_change()

    def _take_tokens(self, tokens: Tokens) -> None:
        replica = self._replicas.get(tokens.replica)
        if replica is None or replica.up.incarnation != tokens.incarnation:
            return  # a late message of a dead incarnation
        now = trio.current_time()
        for event in tokens.events:
            record = replica.requests.get(event.seq_id)
            if record is None:
                continue
            self._generated_tokens += record.take(event, now)
            if event.finish_reason is not None:
                del replica.requests[record.seq_id]
                self._close(record, event.finish_reason)
        self._assign()

    def _lose_replica(self, down: ReplicaDown) -> None:
        replica = self._replicas.get(down.replica)
        if replica is None or replica.up.incarnation != down.incarnation:
            return
        del self._replicas[down.replica]
        for seq_id, record in replica.requests.items():
            record.crashes += down.crashed and seq_id in down.in_step
            culprit = down.crashed and is_culprit(record, down.in_step)
            self._requeue(record)
            if culprit:
                log.error("request poisoned", request=record.request_id, crashes=record.crashes)
                self._fail(record, RequestPoisoned(record.request_id, record.crashes))
        write = log.warning if down.crashed else log.info
        write(
            "replica down",
            replica=down.replica,
            scheduler_incarnation=down.incarnation,
            requests=len(replica.requests),
        )
        self._assign()

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
        for record, replica in assignment.assigned:
            self._give(record, replica)

    def _give(self, record: RequestRecord, replica: _Replica) -> None:
        if record.token_ids or record.crashes:
            self._resumed += 1
            self._resumed_tokens += len(record.prompt_token_ids) + len(record.token_ids)
        record.replica = replica.up.replica
        record.resumed_at = len(record.token_ids)
        del self._waiting[record.seq_id]
        replica.requests[record.seq_id] = record
        replica.up.scheduler.submit(record)

    def _withdraw(self, record: RequestRecord) -> None:
        replica = self._replicas.get(record.replica) if record.replica is not None else None
        if replica is not None:
            replica.up.scheduler.abort(record.seq_id)
            replica.requests.pop(record.seq_id, None)

    def _fail(self, record: RequestRecord, error: Exception) -> None:
        self._withdraw(record)
        self._close(record, "error")
        record.fail(error)

    def _close(self, record: RequestRecord, reason: str) -> None:
        self._finished[reason] = self._finished.get(reason, 0) + 1
        self._limits.tokens -= record.max_total
        self._remove(record)
