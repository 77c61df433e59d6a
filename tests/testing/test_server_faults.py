"""Fault plans in a real server: real processes kill, suspend and garble themselves, clients lose nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ullm.testing import ServerProcess, assert_finished_once, assert_same_text
from ullm.testing.control import FaultControl
from ullm.testing.server import SCRIPTED, ServerFailed

if TYPE_CHECKING:
    from ullm.testing.plugin import OpenServer

pytestmark = pytest.mark.process

NAMED = ("--served-model-name", "m")
WATCHFUL = ("--step-timeout", "1", "--health-interval", "0.2", "--max-restarts", "1000")
REQUESTS = 4


@pytest.fixture(scope="module")
def calm_server(
    tmp_path_factory: pytest.TempPathFactory, ullm_scripted_model: Path
) -> Iterator[ServerProcess]:
    """One server for all plans; it has nothing armed before and after each test."""
    with ServerProcess(
        *("--model", str(ullm_scripted_model), *NAMED, *SCRIPTED, *WATCHFUL),
        environ={"ULLM_SCRIPTED_STEP_SECONDS": "0.005"},
        log=tmp_path_factory.mktemp("log") / "server.log",
        admin=True,
    ) as server:
        yield server


@pytest.fixture
def server(calm_server: ServerProcess) -> Iterator[ServerProcess]:
    yield calm_server
    calm_server.faults.clear()


def complete(server: ServerProcess, number: int = 0, max_tokens: int = 100) -> str:
    body = {"model": "m", "prompt": [300 + number], "max_tokens": max_tokens, "temperature": 0}
    status, answer = server.request("POST", "/v1/completions", body)
    assert status == 200, answer
    assert_finished_once([answer], "length")
    assert answer["usage"]["completion_tokens"] == max_tokens
    return str(answer["choices"][0]["text"])


def complete_all(server: ServerProcess) -> list[str]:
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(lambda number: complete(server, number), range(REQUESTS)))


@pytest.fixture(scope="module")
def undisturbed(calm_server: ServerProcess) -> list[str]:
    return complete_all(calm_server)


def eventually(what: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "plan",
    [
        "worker.step:crash@nth=20",
        "worker.step:exit@nth=20",
        "worker.step:raise@nth=20",
        "worker.step:oom@nth=20",
        "worker.step:hang@nth=20",
        "worker.step:stop@nth=20",
        "worker.step:slow@nth=20,seconds=0.2",
        "worker.step:crash@nth=20; worker.start:crash@times=2",
        "frame.to_worker:drop@nth=20,message=Step",
        "frame.to_worker:duplicate@nth=20,message=Step",
        "frame.to_worker:corrupt@nth=20,message=Step",
        "frame.from_worker:drop@nth=20,message=StepResult",
        "frame.from_worker:duplicate@nth=20,message=StepResult",
        "frame.from_worker:corrupt@nth=20,message=StepResult",
        "scheduler.step:raise@nth=20; router.tokens:raise@nth=40",
        "worker.step:crash@nth=20; scheduler.step:raise@nth=20",
        "worker.step:crash@nth=20; scheduler.step:raise@nth=21",
    ],
)
def test_no_text_is_lost(server: ServerProcess, undisturbed: list[str], plan: str) -> None:
    before = len(server.faults.describe().fired)
    server.faults.arm(plan)
    for expected, got in zip(undisturbed, complete_all(server), strict=True):
        assert_same_text(expected, got)
    report = server.faults.describe()
    assert [armed.remaining for armed in report.armed] == [0] * len(report.armed)
    assert {fired.point for fired in report.fired[before:]} == {
        part.split(":")[0].strip() for part in plan.split(";")
    }


def test_an_idle_worker_that_is_suspended_is_replaced(server: ServerProcess) -> None:
    eventually(lambda: server.request("GET", "/ready")[0] == 200)
    before = {worker.pid for worker in server.workers()}
    server.faults.arm("worker.ping:stop")
    eventually(lambda: before - {worker.pid for worker in server.workers()})
    eventually(lambda: server.request("GET", "/ready")[0] == 200)
    complete(server)


def test_what_is_armed_can_be_cleared(server: ServerProcess) -> None:
    before = len(server.faults.describe().fired)
    server.faults.arm("worker.step:crash@times=always,nth=1000000")
    assert [armed.fault for armed in server.faults.describe().armed] == [
        "worker.step:crash@nth=1000000,times=always"
    ]
    assert server.faults.clear().armed == []
    complete(server)
    assert len(server.faults.describe().fired) == before


def test_a_plan_from_the_environment_counts_from_the_start(
    ullm_server: OpenServer, ullm_faults: FaultControl
) -> None:
    ullm_faults.arm("worker.step:crash@nth=5,times=2")
    server = ullm_server(*NAMED)
    complete(server)
    assert [fired.epoch for fired in ullm_faults.history] == [1, 2]
    assert "fault injected" in server.errors()
    assert server.close() == 0
    assert [fired.epoch for fired in ullm_faults.history] == [1, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--faults", "worker.step:explode"], r"--faults: 'worker\.step:explode': no action 'explode'"),
        (["--transport", "thread", "--faults", "worker.step:stop"], "a thread cannot be stopped by SIGSTOP"),
    ],
)
def test_a_bad_plan_is_refused_before_anything_starts(
    ullm_server: OpenServer, options: list[str], said: str
) -> None:
    with pytest.raises(ServerFailed, match=said) as caught:
        ullm_server(*options)
    assert "Traceback" not in str(caught.value)


def test_a_bad_plan_is_refused_at_run_time(server: ServerProcess) -> None:
    with pytest.raises(ServerFailed, match=r"400 .*'worker\.step:explode': no action 'explode'"):
        server.faults.arm("worker.step:explode")
