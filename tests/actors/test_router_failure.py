"""A router that fails and restarts while requests wait, and the requests that it blames for lost workers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ullm.actors.block_transfer import AnyTransfer
from ullm.actors.router import Router
from ullm.actors.router_messages import ReplicaDown, ReplicaUp, RouterMessage, Tokens
from ullm.config import EngineConfig
from ullm.errors import FaultInjected, RequestPoisoned
from ullm.faults import FaultInjector, FaultPlan
from ullm.sampling import SamplingParams
from ullm.scheduling.request import CLEARED_AFTER, RequestRecord
from ullm.scheduling.sequence import TokenEvent


def record(router: Router, crashes: int = 0) -> RequestRecord:
    number = router.arrival()
    params = SamplingParams(seed=0)
    result = RequestRecord(number, f"r{number}", [1], params, 9, number, lambda time: None)
    result.crashes = crashes
    return result


async def fail_once(router: Router) -> None:
    router.mailbox.send_nowait(Tokens(0, 1, []))
    with pytest.raises(FaultInjected):
        await router.run(task_status=trio.TASK_STATUS_IGNORED)


@pytest.mark.parametrize("crashes", [0, 2])
async def test_each_waiting_request_is_submitted_once(nursery: trio.Nursery, crashes: int) -> None:
    router = Router(EngineConfig(), FaultInjector(FaultPlan.parse("router.tokens:raise@times=2")))
    records = [record(router, crashes), record(router)]
    for each in records:
        router.submit(each)  # no replica is up, so they wait
    for _ in range(2):
        await fail_once(router)
    await nursery.start(lambda task_status: router.run(task_status=task_status))
    replica = Replica(router)
    await replica.up()
    # A suspect runs alone, and first.
    assert list(replica.running.values()) == (records[:1] if crashes else records)
    assert router.statistics().unassigned == (1 if crashes else 0)
    assert router.finish_all("abort") == 2
    assert router.live == 0
    nursery.cancel_scope.cancel()


class Replica:
    """A replica under the test's control; it is its own `SchedulerHandle`."""

    def __init__(self, router: Router) -> None:
        self.running: dict[int, RequestRecord] = {}
        self._router, self._incarnation = router, 0

    async def up(self) -> None:
        self._incarnation += 1
        self.running.clear()
        await self._tell(ReplicaUp(0, self._incarnation, 64, self))

    async def down(self, in_step: set[int], *, crashed: bool = True) -> None:
        await self._tell(ReplicaDown(0, self._incarnation, frozenset(in_step), crashed))

    async def tokens(self, count: int) -> None:
        """Have each running request emit ``count`` tokens."""
        events = [
            TokenEvent(record.seq_id, len(record.token_ids), [7] * count) for record in self.running.values()
        ]
        await self._tell(Tokens(0, self._incarnation, events))

    def submit(self, record: RequestRecord) -> None:
        self.running[record.seq_id] = record

    def abort(self, seq_id: int) -> None:
        self.running.pop(seq_id, None)

    def transfer(self, transfer: AnyTransfer) -> None:
        raise AssertionError("there is no other replica to move to")

    async def _tell(self, message: RouterMessage) -> None:
        self._router.mailbox.send_nowait(message)
        await wait_all_tasks_blocked()


@pytest.fixture
async def router(nursery: trio.Nursery) -> AsyncIterator[Router]:
    router = Router(EngineConfig())
    await nursery.start(lambda task_status: router.run(task_status=task_status))
    yield router
    nursery.cancel_scope.cancel()


async def test_who_makes_progress_is_not_blamed_for_losses_before(router: Router) -> None:
    """Somebody kills the workers: the only request that they have goes on each time."""
    replica, only = Replica(router), record(router)
    router.submit(only)
    for count in (CLEARED_AFTER, CLEARED_AFTER, 1):
        await replica.up()
        await replica.tokens(count)
        await replica.down(set(replica.running))
    assert only.error is None
    assert only.crashes == 2


async def test_a_neighbour_that_goes_on_is_never_a_suspect(router: Router) -> None:
    """The guilty one is still in its prompt when it kills the worker; the others need not wait for it."""
    replica, guilty, neighbour = Replica(router), record(router), record(router)
    for each in (guilty, neighbour):
        router.submit(each)
    for _ in range(2):
        await replica.up()
        replica.running.pop(guilty.seq_id)
        await replica.tokens(CLEARED_AFTER)
        await replica.down({guilty.seq_id, neighbour.seq_id})
    assert (guilty.crashes, neighbour.crashes) == (2, 1)
    await replica.up()
    assert list(replica.running.values()) == [guilty]
    await replica.down({guilty.seq_id})
    assert isinstance(guilty.error, RequestPoisoned)
    await replica.up()
    assert list(replica.running.values()) == [neighbour]


@pytest.mark.parametrize("crashed", [False, True])
async def test_only_who_was_in_the_step_is_condemned(router: Router, crashed: bool) -> None:
    """A step of requests that were taken back may still be running, and a scheduler may fail by itself."""
    replica, suspect = Replica(router), record(router, crashes=3)
    router.submit(suspect)
    await replica.up()
    assert replica.running
    await replica.down({1000} if crashed else {suspect.seq_id}, crashed=crashed)
    assert suspect.error is None
