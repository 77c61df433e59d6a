"""Hand-over of KV: a request moves to another replica, and its KV blocks are there before it is.

While they are copied the request is computed on where it is. Blocks enter the other replica's prefix cache;
then the request is submitted there with its tokens so far, as after a loss, and finds all of them but the
last few. So nothing but the prefix cache decides what is used, and whatever goes wrong costs only the copy:
the request stays, or is resumed elsewhere from its tokens.

A piece of KV is exported by the ranks of one replica and imported by the same ranks of the other, each in
order with its steps. It goes through shared memory where both replicas are on this host, else through the
workers' pipes and the links to other hosts. A transport between GPUs, such as NIXL or NCCL, would take the
place of `SharedSegments`: the messages name blocks, and say where their content is.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import trio
from msgspec import structs

from ullm.actors.block_transfer import AnyTransfer, BlockTransfer
from ullm.actors.router_messages import HandoverStatistics, ReplicaUp
from ullm.actors.shared_segments import SharedSegments, open_segments
from ullm.actors.transports.background import BackgroundTasks, background_tasks
from ullm.faults import FaultInjector
from ullm.faults.injector import FaultSite
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.messages import BlocksExported, ExportBlocks, ImportBlocks, SharedMemory
from ullm.scheduling.block_pool import BlockPool, extend_hashes, root_of
from ullm.scheduling.request import RequestRecord

AT_ONCE = 2
"""Requests whose KV is copied at the same time; others wait, and are computed on meanwhile."""
PIECE_BYTES = 8 << 20
"""Bytes of KV that a rank copies between two steps: some milliseconds, in which its other requests wait."""
PIECE_BLOCKS = 256
"""Most blocks of a piece, where they are small."""

log = get_logger(__name__)


class HandoverFailed(Exception):
    """A request does not move, or its KV is not used; it goes on without.

    Args:
        outcome: a word for it, as counted.
    """

    def __init__(self, outcome: str, cause: str) -> None:
        super().__init__(cause)
        self.outcome = outcome


@dataclass(eq=False, slots=True)
class Handover:
    """A request on its way from one replica to another.

    Args:
        seq_id: the number that it has at the first one.
        blocks: leading blocks that the other one has.
        ended: set once it has moved, or will not.
    """

    record: RequestRecord
    source: ReplicaUp
    target: ReplicaUp
    seq_id: int
    blocks: int = 0
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def is_current(self) -> bool:
        """Whether the request is still where it was."""
        record = self.record
        return record.seq_id == self.seq_id and record.replica == self.source.replica and not record.done


class Handovers:
    """All hand-overs of an engine. The router begins them, and takes in the requests that have moved.

    Args:
        faults: faults to inject at the point ``handover.chunk``.
        arrive: gives a request to the replica that has its KV; returns False if that is no longer possible.
    """

    def __init__(self, faults: FaultInjector, arrive: Callable[[Handover], bool]) -> None:
        self._faults = faults
        self._arrive = arrive
        self._tasks: BackgroundTasks | None = None
        self._live: dict[int, Handover] = {}
        self._turns = trio.Semaphore(AT_ONCE)
        self._numbers = itertools.count(1)
        self._shares_memory = True
        self._outcomes: dict[str, int] = {}
        self._blocks = self._bytes = 0
        self._seconds = 0.0

    def statistics(self) -> HandoverStatistics:
        """Return the counts since the start as a frozen value."""
        return HandoverStatistics(dict(self._outcomes), self._blocks, self._bytes, self._seconds)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Run hand-overs in this context; those that have not ended with it never will: requests stay."""
        async with background_tasks() as self._tasks:
            try:
                yield
            finally:
                self._tasks = None

    def begin(self, record: RequestRecord, source: ReplicaUp, target: ReplicaUp) -> None:
        """Begin to move a request, unless it moves already; return at once."""
        if self._tasks is not None and record.seq_id not in self._live:
            handover = self._live[record.seq_id] = Handover(record, source, target, record.seq_id)
            self._tasks.start_soon(partial(self._run, handover))

    async def settle(self, replica: int) -> None:
        """Wait until nothing is on its way from a replica, at most `ullm.protocol.stop_budget.HANDOVER`."""
        with trio.move_on_after(stop_budget.HANDOVER):
            for handover in [each for each in self._live.values() if each.source.replica == replica]:
                await handover.ended.wait()

    async def _run(self, handover: Handover) -> None:
        outcome, cause = "late", f"it took more than {stop_budget.HANDOVER:g} s"
        sides = (handover.source, handover.target)
        try:
            async with self._turns:
                began = trio.current_time()
                with trio.move_on_after(stop_budget.HANDOVER):
                    async with trio.open_nursery() as nursery:
                        for side in sides:
                            nursery.start_soon(_cancel_after, side.ended, nursery.cancel_scope)
                        outcome, cause = await self._move(handover)
                        nursery.cancel_scope.cancel()
        finally:
            del self._live[handover.seq_id]
            handover.ended.set()
        lost = [side.replica for side in sides if side.ended.is_set()]
        if outcome == "late" and lost:
            outcome, cause = "lost", f"replica {lost[0]} has ended"
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        self._seconds += trio.current_time() - began
        self._log(handover, outcome, cause)

    async def _move(self, handover: Handover) -> tuple[str, str]:
        """Copy the KV, then move the request; return how it went, and why not otherwise."""
        with _Held(handover.source) as kept, _Held(handover.target) as arrived:
            try:
                await self._copy(handover, kept, arrived)
            except HandoverFailed as failure:
                return failure.outcome, str(failure)
            if not handover.is_current:
                return "ended", ""
            if not self._arrive(handover):
                return "lost", "the other replica takes no more requests"
        return "moved", ""

    async def _copy(self, handover: Handover, kept: _Held, arrived: _Held) -> None:
        """Copy all full blocks that the other replica lacks.

        Raises:
            HandoverFailed: not all of them have arrived.
        """
        source, target = handover.source, handover.target
        identity = _common_identity(source, target)
        record, size = handover.record, source.block_size
        tokens = [*record.prompt_token_ids, *record.token_ids]
        extend_hashes(record.block_hashes, tokens, size, (len(tokens) - 1) // size, root_of(record))
        found = kept.pool.find(record.block_hashes)
        there = arrived.pool.find(record.block_hashes[: len(found)])
        kept.take(found[len(there) :])
        arrived.take(there)
        handover.blocks = len(there)
        needed = -(-(len(tokens) + 1) // size) - len(there)
        step = _blocks_per_piece(source)
        shares = self._shares_memory and source.shares_memory and target.shares_memory
        with open_segments(source.ranks if shares else 0) as segments:
            for first in range(len(there), len(found), step):
                if not handover.is_current:
                    return
                if arrived.pool.num_available < needed - (handover.blocks - len(there)):
                    raise HandoverFailed("full", "the other replica has no room for its KV")
                digests = record.block_hashes[first : min(first + step, len(found))]
                blocks = arrived.allocate(len(digests))
                await self._copy_piece(handover, identity, found[first : first + step], blocks, segments)
                for block, digest in zip(blocks, digests, strict=True):
                    arrived.pool.publish(block, digest)
                handover.blocks += len(blocks)

    async def _copy_piece(
        self,
        handover: Handover,
        identity: str,
        blocks: list[int],
        into: list[int],
        segments: SharedSegments | None,
    ) -> None:
        source, target = handover.source, handover.target
        segments = segments if self._shares_memory else None
        memory = [segments.of(rank) if segments else None for rank in range(source.ranks)]
        number = next(self._numbers)
        exporting = BlockTransfer([ExportBlocks(number, blocks, identity, each) for each in memory])
        await _carry_out(source, exporting)
        if not exporting.lacks_memory:
            _check(exporting)
            exported = [cast(BlocksExported, exporting.answers[rank]) for rank in range(source.ranks)]
            answers = await self._with_faults(exported, segments)
            importing = self._import(answers, identity, into, memory)
            await _carry_out(target, importing)
            if not importing.lacks_memory:
                _check(importing)
                self._blocks += len(blocks) * source.ranks
                self._bytes += sum(answer.size for answer in answers)
                return
        self._shares_memory = False
        log.info("workers cannot use shared memory for KV, it goes through pipes", cause=exporting.error)
        await self._copy_piece(handover, identity, blocks, into, None)

    def _import(
        self,
        answers: list[BlocksExported],
        identity: str,
        into: list[int],
        memory: list[SharedMemory | None],
    ) -> BlockTransfer[ImportBlocks]:
        number = next(self._numbers)
        return BlockTransfer(
            [
                ImportBlocks(number, into, identity, answer.size, answer.checksum, each, answer.content)
                for answer, each in zip(answers, memory, strict=True)
            ]
        )

    async def _with_faults(
        self, answers: list[BlocksExported], segments: SharedSegments | None
    ) -> list[BlocksExported]:
        """Return the exported content with the faults of its way.

        Raises:
            HandoverFailed: a fault has dropped it.
        """
        for firing in self._faults.fire(FaultSite("handover.chunk")):
            firing.note(f"{firing.action}: a piece of KV")
            if firing.action == "drop":
                raise HandoverFailed("lost", "a piece of KV is lost: injected fault")
            if firing.action == "delay":
                await trio.sleep(firing.fault.duration)
            elif segments is not None:
                segments.corrupt()
            else:
                content = answers[0].content
                answers[0] = structs.replace(answers[0], content=bytes([content[0] ^ 0xFF]) + content[1:])
        return answers

    def _log(self, handover: Handover, outcome: str, cause: str) -> None:
        facts = {
            "request": handover.record.request_id,
            "source": handover.source.replica,
            "target": handover.target.replica,
            "blocks": handover.blocks,
        }
        if cause:
            log.warning("KV not handed over", outcome=outcome, cause=cause, **facts)
        else:
            log.debug("KV handed over", outcome=outcome, **facts)


class _Held:
    """Blocks of a replica's pool that are held until this context is left, or its scheduler ends."""

    def __init__(self, replica: ReplicaUp) -> None:
        self._replica = replica
        self._blocks: list[int] = []

    @property
    def pool(self) -> BlockPool:
        """The replica's pool.

        Raises:
            HandoverFailed: the replica has ended.
        """
        if self._replica.pool is None or self._replica.ended.is_set():
            raise HandoverFailed("lost", f"replica {self._replica.replica} has ended")
        return self._replica.pool

    def take(self, blocks: list[int]) -> None:
        """Hold blocks that the pool has found."""
        self.pool.take(blocks)
        self._blocks += blocks

    def allocate(self, count: int) -> list[int]:
        """Hold blocks for new content.

        Raises:
            HandoverFailed: there are too few.
        """
        blocks = self.pool.allocate(count)
        self._blocks += blocks
        return blocks

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        if self._replica.pool is not None and not self._replica.ended.is_set():
            self._replica.pool.release(self._blocks)


def _common_identity(source: ReplicaUp, target: ReplicaUp) -> str:
    """Return what the KV of both replicas is of.

    Raises:
        HandoverFailed: it differs, or is not known.
    """
    ours, theirs = source.info, target.info
    if ours is None or theirs is None or not ours.kv_identity or ours.kv_identity != theirs.kv_identity:
        raise HandoverFailed("identity", "the other replica's KV is of other weights, kernels, or layout")
    if (source.block_size, source.ranks) != (target.block_size, target.ranks):
        raise HandoverFailed("identity", "the other replica's KV has another layout")
    return ours.kv_identity


def _blocks_per_piece(source: ReplicaUp) -> int:
    bytes_per_token = source.info.kv_bytes_per_token if source.info is not None else 0
    return max(1, min(PIECE_BLOCKS, PIECE_BYTES // max(1, source.block_size * bytes_per_token)))


async def _carry_out(replica: ReplicaUp, transfer: AnyTransfer) -> None:
    """Have a replica's workers carry out a transfer, and wait for their answers."""
    replica.scheduler.transfer(transfer)
    try:
        await transfer.done.wait()
    finally:
        transfer.withdrawn = True


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _check(transfer: AnyTransfer) -> None:
    """Raise HandoverFailed if a rank has not carried out a transfer."""
    if transfer.error:
        raise HandoverFailed("refused", transfer.error)
