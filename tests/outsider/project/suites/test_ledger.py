"""A service that has nothing to do with language models, with points of its own."""

import errno

import pytest
import trio
from hypothesis import given, settings

from ullm.errors import FaultInjected
from ullm.faults import injected, point
from ullm.testing import run_virtually, strategies


class Ledger:
    """Writes each entry exactly once, and tries again where that fails."""

    def __init__(self):
        self.entries = []

    async def write(self, entry):
        while True:
            try:
                with trio.fail_after(5):
                    await point("ledger.write", request=entry)
            except (FaultInjected, OSError, trio.TooSlowError):
                continue
            self.entries.append(entry)
            return


async def write_all():
    ledger = Ledger()
    for number in range(5):
        await ledger.write(f"entry-{number}")
    return ledger.entries


@pytest.mark.trio
async def test_a_full_disk(ullm_faults):
    ullm_faults.arm("ledger.write:disk_full@request=entry-3")
    assert len(await write_all()) == 5
    (fired,) = ullm_faults.history
    assert (fired.request, fired.effect) == ("entry-3", "raised")


@pytest.mark.trio
async def test_what_it_raises(ullm_faults):
    ullm_faults.arm("ledger.write:disk_full")
    with pytest.raises(OSError, match="No space") as caught:
        await point("ledger.write")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.trio
async def test_a_clock_that_jumps(ullm_clock, ullm_faults):
    ullm_faults.arm("ledger.write:jump@seconds=3")
    assert len(await write_all()) == 5
    assert trio.current_time() >= 3


@settings(max_examples=30, deadline=None)
@given(strategies.plans(["ledger.write"], latest=5, seconds=2.0))
def test_every_entry_once(plan):
    with injected(plan):
        assert run_virtually(write_all) == [f"entry-{number}" for number in range(5)]
