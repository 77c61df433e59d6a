"""One seed is one run, and a virtual run takes milliseconds."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from tests.support.seeded import Trace, run_seeded
from ullm.sampling import SamplingParams
from ullm.testing import open_scripted_engine, run_virtually, virtual_clock, write_scripted_model

PLAN = "worker.step:crash@nth=5; scheduler.step:raise@nth=5; frame.from_worker:drop@message=StepResult,nth=9"


async def serve(model: Path) -> list[str]:
    """Four requests at once on two replicas, amid faults; return how they ended, and what was told."""
    ended: list[str] = []
    async with open_scripted_engine(
        model, step_seconds=1.0, replicas=2, max_restarts=9, faults=PLAN
    ) as engine:

        async def ask(number: int) -> None:
            params = SamplingParams(temperature=0, max_tokens=10 + number, ignore_eos=True)
            async with engine.generate(f"The supervisor {number}", params) as generation:
                outputs = [output async for output in generation]
            ended.append(f"{number} {trio.current_time():.3f} {''.join(o.text for o in outputs)!r}")

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(ask, number)
    return ended


def traced(seed: int, model: Path) -> bytes:
    trace = Trace()
    ended = run_seeded(seed, serve, model, instruments=[trace])
    assert len(trace) > 500
    return bytes(trace) + "\n".join(ended).encode()


def test_two_runs_of_one_seed_are_equal_byte_for_byte(model: Path) -> None:
    first = traced(1, model)
    assert traced(1, model) == first
    assert traced(2, model) != first


@pytest.mark.slow
@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_they_are_equal_in_other_processes(model: Path, hash_seed: str) -> None:
    """The hashes of strings, and the addresses of objects, decide nothing."""
    code = (
        "import sys; from pathlib import Path; from tests.testing.test_seeded import traced;"
        "sys.stdout.buffer.write(traced(1, Path(sys.argv[1])))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(model)],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
    )
    assert child.stdout.replace(b"tests.testing.test_seeded.", f"{__name__}.".encode()) == traced(1, model)


# --- the clock counts hops through threads --------------------------------------------------------------


async def test_time_stands_still_while_a_thread_works() -> None:
    clock = virtual_clock()

    def run() -> None:
        async def work() -> tuple[float, float]:
            began = trio.current_time()
            await trio.to_thread.run_sync(time.sleep, 0.1)
            between = trio.current_time() - began
            await trio.sleep(600)
            return between, trio.current_time() - began

        assert trio.run(work, clock=clock) == (0.0, 600.0)

    began = time.perf_counter()
    await trio.to_thread.run_sync(run)
    assert clock.autojump_threshold == 0.0
    assert time.perf_counter() - began < 2.0


def test_time_goes_on_for_those_who_watch_over_a_thread_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ullm.testing.clock.HOP_SECONDS", 0.1)

    async def work() -> bool:
        with trio.move_on_after(600) as scope:
            await trio.to_thread.run_sync(time.sleep, 0.5, abandon_on_cancel=True)
        return scope.cancelled_caught

    assert run_virtually(work)


def test_several_hops_are_counted_one_by_one() -> None:
    async def work() -> float:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for seconds in (0.02, 0.04, 0.06):
                nursery.start_soon(trio.to_thread.run_sync, time.sleep, seconds)
        return trio.current_time() - began

    assert run_virtually(work) == 0.0


def test_a_virtual_hour_takes_milliseconds(tmp_path: Path) -> None:
    """720 steps of five seconds each; guessing by 20 ms of idleness took 15 s and more."""
    model = write_scripted_model(tmp_path)

    async def hour() -> float:
        async with open_scripted_engine(model, step_seconds=5.0) as engine:
            began = trio.current_time()
            params = SamplingParams(temperature=0, max_tokens=720, ignore_eos=True)
            async with engine.generate([300], params) as generation:
                assert len([output async for output in generation]) > 0
            return trio.current_time() - began

    began = time.perf_counter()
    assert run_virtually(hour) >= 3600.0
    assert time.perf_counter() - began < 7.0
