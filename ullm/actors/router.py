"""The router: the only owner of what must survive. It picks a replica, and resumes after a loss.

Readers and the engine call its synchronous methods; schedulers talk to its mailbox. Should its task
fail, the records are still here, and the restarted task submits them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from ullm.actors.router_messages import ReplicaDown, ReplicaUp, RouterMessage, RouterStatistics, Tokens
from ullm.config import EngineConfig
from ullm.errors import InvalidParameter, QueueFull, RequestPoisoned, TooManyTokens
from ullm.faults import FaultInjector
from ullm.logs import get_logger
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import FinishReason, TokenEvent
from ullm.supervision.actor import Mailbox

log = get_logger("ullm.router")

SUSPECT_AFTER = 2
"""Worker losses in a row after which a request that was being computed each time runs alone."""
CLEARED_AFTER = 4
"""Tokens after which a request is no longer blamed for losses before them, and no longer runs alone: had it
killed its worker, that would come again in the first step, because it goes on exactly where it was."""


@dataclass(slots=True)
class _Replica:
    """A replica that is up."""

    up: ReplicaUp
    assigned: set[int] = field(default_factory=set)


class Router:
    """Owns every request record.

    Args:
        config: batch size, replicas and queue limit, which bound how many requests are admitted.
        faults: what shall go wrong at the point ``router.tokens``.
    """

    def __init__(self, config: EngineConfig, faults: FaultInjector | None = None) -> None:
        self.mailbox: Mailbox[RouterMessage] = Mailbox(float("inf"), "router")
        self._faults = faults or FaultInjector()
        self._num_replicas = config.replicas
        self._capacity = config.max_bs * config.replicas  # 0: known when the first one is up
        self._max_queue = config.max_queue
        self._records: dict[int, RequestRecord] = {}
        self._unassigned: dict[int, RequestRecord] = {}
        self._replicas: dict[int, _Replica] = {}
        self._retired: set[int] = set()
        self._arrivals = 0
        self._held_after = float("inf")
        self._max_tokens = config.max_admitted_tokens
        self._admitted_tokens = 0
        self._changed = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self._finished: dict[str, int] = {}
        self._prompt_tokens = self._generated_tokens = self._resumed = self._resumed_tokens = 0

    # --- for readers and the engine ------------------------------------------------------------------

    def arrival(self) -> int:
        """A number for a new choice: its ``seq_id``, and its place in the queue."""
        self._arrivals += 1
        return self._arrivals

    def check_room(self, choices: int = 1, tokens: int = 0) -> None:
        """Raise if so many more choices and tokens would not fit.

        Args:
            tokens: prompt and possible output, of all choices together.

        Raises:
            QueueFull, TooManyTokens: not now.
            InvalidParameter: never.
        """
        limit = self._capacity + self._max_queue
        if choices > limit:
            raise InvalidParameter(f"n is {choices}, but this server runs and queues {limit} at most", "n")
        waiting = len(self._records) - self._capacity
        if waiting + choices > self._max_queue:
            raise QueueFull(max(0, waiting), self._max_queue)
        self._check_tokens(tokens)

    def _check_tokens(self, tokens: int) -> None:
        if self._max_tokens is None:
            return
        if tokens > self._max_tokens:
            raise InvalidParameter(
                f"this request may need {tokens} tokens, prompt and output, but this server admits "
                f"{self._max_tokens} at most (--max-admitted-tokens)",
                "max_tokens",
            )
        if self._admitted_tokens + tokens > self._max_tokens:
            raise TooManyTokens(self._admitted_tokens, tokens, self._max_tokens)

    def submit(self, record: RequestRecord) -> None:
        """Admit a request; its reader is notified of all that happens to it."""
        if not self._records:
            self._idle = trio.Event()
        self._records[record.seq_id] = self._unassigned[record.seq_id] = record
        self._prompt_tokens += len(record.prompt_token_ids)
        self._admitted_tokens += record.max_total
        self._assign()
        self.announce_change()

    def finish(self, seq_id: int, reason: FinishReason) -> bool:
        """End a request early with what it has; False if it has ended already."""
        record = self._records.get(seq_id)
        if record is None:
            return False
        self._withdraw(record)
        self._close(record, reason)
        record.finish(reason)
        self._assign()
        return True

    def finish_all(self, reason: FinishReason) -> int:
        """End every request with what it has; returns how many."""
        return sum(self.finish(seq_id, reason) for seq_id in list(self._records))

    def fail_all(self, error: Callable[[], Exception]) -> int:
        """End every request with an error of its own; returns how many."""
        records = list(self._records.values())
        for record in records:
            self._fail(record, error())
        return len(records)

    def find(self, request_id: str) -> list[int]:
        """``seq_id`` of each live choice of a request."""
        return [record.seq_id for record in self._records.values() if record.request_id == request_id]

    async def wait_idle(self) -> None:
        """Wait until no request is live."""
        while self._records:
            await self._idle.wait()

    async def wait_changed(self) -> None:
        """Wait until a request or a replica comes or goes."""
        await self._changed.wait()

    def hold(self) -> None:
        """Keep requests that arrive from now on waiting; those before run on."""
        self._held_after = self._arrivals

    def release(self) -> None:
        """End `hold`."""
        self._held_after = float("inf")
        self._assign()

    @property
    def live(self) -> int:
        """Choices not yet finished."""
        return len(self._records)

    @property
    def held(self) -> int:
        """Live choices that arrived after `hold`."""
        return sum(record.order[1] > self._held_after for record in self._records.values())

    def finish_old(self, reason: FinishReason) -> int:
        """End every request that arrived before `hold`, with what it has; returns how many."""
        old = [r.seq_id for r in self._records.values() if r.order[1] <= self._held_after]
        return sum(self.finish(seq_id, reason) for seq_id in old)

    def retire(self, replica: int, *, retired: bool = True) -> None:
        """Give a replica no more requests; what it runs, it runs to its end."""
        (self._retired.add if retired else self._retired.discard)(replica)
        self._assign()

    def load(self, replica: int) -> int:
        """Choices that a replica has."""
        found = self._replicas.get(replica)
        return len(found.assigned) if found is not None else 0

    @property
    def replicas_up(self) -> frozenset[int]:
        """Replicas that take requests."""
        return frozenset(self._replicas)

    def statistics(self) -> RouterStatistics:
        """What is in the router, as a frozen value."""
        return RouterStatistics(
            live=len(self._records),
            unassigned=len(self._unassigned),
            replicas_up=len(self._replicas),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished=dict(self._finished),
            resumed=self._resumed,
            resumed_tokens=self._resumed_tokens,
            admitted_tokens=self._admitted_tokens,
        )

    # --- the supervised child --------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Take in what schedulers say. After a failure of this task, everything is submitted again."""
        for record in list(self._records.values()):
            self._withdraw(record)
            self._take_back(record)
        self._assign()
        task_status.started()
        async for message in self.mailbox:
            match message:
                case Tokens():
                    await self._faults.at("router.tokens")
                    self._take_tokens(message)
                case ReplicaUp():
                    self._replicas[message.replica] = _Replica(message)
                    self._capacity = message.max_bs * self._num_replicas
                    self._assign()
                    self.announce_change()
                case ReplicaDown():
                    self._lose_replica(message)
                    self.announce_change()

    def _take_tokens(self, tokens: Tokens) -> None:
        replica = self._replicas.get(tokens.replica)
        if replica is None or replica.up.epoch != tokens.epoch:
            return  # a dead incarnation speaks late
        now = trio.current_time()
        for event in tokens.events:
            record = self._records.get(event.seq_id)
            if record is not None and record.replica == tokens.replica:
                self._take_event(record, event, replica, now)
        self._assign()

    def _take_event(self, record: RequestRecord, event: TokenEvent, replica: _Replica, now: float) -> None:
        self._generated_tokens += record.take(event, now)
        if record.crashes and len(record.token_ids) >= record.resumed_at + CLEARED_AFTER:
            record.crashes = 0
        if event.finish_reason is not None:
            replica.assigned.discard(record.seq_id)
            self._close(record, event.finish_reason)

    def _lose_replica(self, down: ReplicaDown) -> None:
        replica = self._replicas.get(down.replica)
        if replica is None or replica.up.epoch != down.epoch:
            return
        del self._replicas[down.replica]
        for seq_id in replica.assigned:
            record = self._records[seq_id]
            record.crashes += down.crashed and seq_id in down.in_step
            self._take_back(record)
            # Alone in its step, and the worker died again: it is the one.
            if down.crashed and record.crashes > SUSPECT_AFTER and down.in_step == {seq_id}:
                log.error("request poisoned", request=record.request_id, crashes=record.crashes)
                self._fail(record, RequestPoisoned(record.request_id, record.crashes))
        say = log.warning if down.crashed else log.info
        say("replica down", replica=down.replica, epoch=down.epoch, requests=len(replica.assigned))
        self._assign()

    # --- choosing a replica ----------------------------------------------------------------------------

    def _assign(self) -> None:
        """Give waiting requests to the least loaded replica; suspects run alone, and first."""
        if not self._unassigned:
            return
        suspects = [record for record in self._unassigned.values() if record.crashes >= SUSPECT_AFTER]
        for record in suspects:
            if (alone := self._vacant()) is not None:
                self._give(record, alone)
        for record in list(self._unassigned.values()):
            replica = self._least_loaded()
            if replica is not None and record.crashes < SUSPECT_AFTER and record.order[1] <= self._held_after:
                self._give(record, replica)

    def _least_loaded(self) -> _Replica | None:
        """Of the replicas without a suspect."""
        open_ones = [
            replica
            for number, replica in self._replicas.items()
            if number not in self._retired and not self._has_suspect(replica)
        ]
        return min(open_ones, key=lambda replica: len(replica.assigned), default=None)

    def _vacant(self) -> _Replica | None:
        """The least loaded replica, its requests taken back; they go on after the suspect."""
        replica = self._least_loaded()
        for seq_id in list(replica.assigned) if replica is not None else ():
            record = self._records[seq_id]
            self._withdraw(record)
            self._take_back(record)
        return replica

    def _has_suspect(self, replica: _Replica) -> bool:
        assigned = replica.assigned  # a suspect runs alone
        return len(assigned) == 1 and self._records[next(iter(assigned))].crashes >= SUSPECT_AFTER

    def _give(self, record: RequestRecord, replica: _Replica) -> None:
        if record.token_ids or record.crashes:
            self._resumed += 1
            self._resumed_tokens += len(record.prompt_token_ids) + len(record.token_ids)
        record.replica = replica.up.replica
        record.resumed_at = len(record.token_ids)
        del self._unassigned[record.seq_id]
        replica.assigned.add(record.seq_id)
        replica.up.submit(record)

    def _take_back(self, record: RequestRecord) -> None:
        """Make it wait for a replica again, by a new number: what is still said of the old one is dropped."""
        del self._records[record.seq_id]
        self._unassigned.pop(record.seq_id, None)  # it may have been waiting already
        record.replica = None
        record.seq_id = self.arrival()
        self._records[record.seq_id] = self._unassigned[record.seq_id] = record

    def _withdraw(self, record: RequestRecord) -> None:
        replica = self._replicas.get(record.replica) if record.replica is not None else None
        if replica is not None:
            replica.up.abort(record.seq_id)
            replica.assigned.discard(record.seq_id)

    def _fail(self, record: RequestRecord, error: Exception) -> None:
        self._withdraw(record)
        self._close(record, "error")
        record.fail(error)

    def _close(self, record: RequestRecord, reason: str) -> None:
        self._finished[reason] = self._finished.get(reason, 0) + 1
        del self._records[record.seq_id]
        self._unassigned.pop(record.seq_id, None)
        self._admitted_tokens -= record.max_total
        if not self._records:
            self._idle.set()
        self.announce_change()

    def announce_change(self) -> None:
        """Wake who waits for a change."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()
