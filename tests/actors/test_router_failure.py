"""A router that fails while requests wait, and goes on without losing or doubling one."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ullm.actors.router import Router
from ullm.actors.routing import ReplicaUp, Tokens
from ullm.config import EngineConfig
from ullm.core.request import RequestRecord
from ullm.errors import FaultInjected
from ullm.faults import FaultInjector, FaultPlan
from ullm.sampling import SamplingParams


def record(router: Router, crashes: int = 0) -> RequestRecord:
    number = router.arrival()
    params = SamplingParams(seed=0)
    found = RequestRecord(number, f"r{number}", [1], params, 9, (0, number), lambda: None)
    found.crashes = crashes
    return found


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
    submitted: list[RequestRecord] = []
    router.mailbox.send_nowait(ReplicaUp(0, 1, submitted.append, lambda seq_id: None))
    await wait_all_tasks_blocked()
    # A suspect runs alone, and first.
    assert submitted == (records[:1] if crashes else records)
    assert router.statistics().unassigned == (1 if crashes else 0)
    assert router.finish_all("abort") == 2
    assert router.live == 0
    nursery.cancel_scope.cancel()
