"""Sleep and wake of a real server, over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import SCRIPTED, Serve, Server, is_gone
from tests.support.streams import Stream, streams, texts
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

LEVELS = [0, 1, 2, 3]
SOME_LEVELS = [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]


def sleep_state(server: Server) -> str:
    """``awake``, ``falling_asleep``, ``asleep`` or ``waking``."""
    found: str = server.get("/health").json()["sleep"]["state"]
    return found


class Asking:
    """A request to the admin listener that takes its time."""

    def __init__(self, server: Server, path: str, body: Any = None) -> None:
        self._answer: list[httpx.Response] = []
        self._thread = threading.Thread(target=lambda: self._answer.append(server.admin("POST", path, body)))
        self._thread.start()

    def answer(self) -> httpx.Response:
        """Wait for it."""
        self._thread.join(30)
        return self._answer[0]


@pytest.fixture
def server(tough_server: Server) -> Iterator[Server]:
    """Awake, before and after."""
    yield tough_server
    assert tough_server.admin("POST", "/wake").json()["state"] == "awake"


@pytest.mark.parametrize("level", LEVELS)
def test_it_sleeps_wakes_and_says_the_same(server: Server, level: int) -> None:
    before = texts(streams(server, 4, 50))
    names = [f'ullm_sleeps_total{{level="{level}"}}', "ullm_wakes_total", "ullm_worker_restarts_total"]
    counts = [server.metric(name) for name in names]
    asleep = server.admin("POST", "/sleep", {"level": level})
    assert (asleep.status_code, asleep.json()["state"], asleep.json()["level"]) == (200, "asleep", level)
    assert server.get("/is_sleeping").json() == {"is_sleeping": True, "level": level}
    assert server.state() == "sleeping"
    assert server.get("/ready").status_code == 200, "a request would wake it"
    assert server.get("/live").status_code == 200
    awake = server.admin("POST", "/wake_up")
    assert (awake.status_code, awake.json()["state"]) == (200, "awake")
    assert server.get("/is_sleeping").json() == {"is_sleeping": False, "level": None}
    assert texts(streams(server, 4, 50)) == before
    assert [server.metric(name) for name in names] == [counts[0] + 1, counts[1] + 1, counts[2]]


def test_at_the_deepest_level_there_is_no_worker_process(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--standby-workers", "0")
    workers = server.workers()
    assert len(workers) == 1
    server.admin("POST", "/sleep", {"level": 3})
    eventually(lambda: all(map(is_gone, workers)), seconds=1)
    assert not server.children()
    texts(streams(server, 2, 20))


@pytest.mark.parametrize("level", SOME_LEVELS)
def test_requests_wake_it_and_are_served(server: Server, level: int) -> None:
    before = texts(streams(server, 4, 50))
    server.admin("POST", "/sleep", {"level": level})
    assert texts(streams(server, 4, 50)) == before
    assert sleep_state(server) == "awake"


@pytest.mark.parametrize("level", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_without_wake_on_request_it_says_when_to_come_back(
    serve: Serve, scripted_model: Path, level: int
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--no-wake-on-request")
    server.admin("POST", "/sleep", {"level": level})
    refused = server.complete(max_tokens=5)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "sleeping")
    assert int(refused.headers["retry-after"]) >= 1
    ready = server.get("/ready")
    assert (ready.status_code, ready.json()["state"]) == (503, "sleeping")
    assert not server.get("/health").json()["sleep"]["registered"]
    assert server.get("/live").status_code == 200
    server.admin("POST", "/wake")
    assert server.get("/ready").status_code == 200
    assert server.complete(max_tokens=5).status_code == 200


@pytest.mark.parametrize("level", SOME_LEVELS)
def test_mode_wait_lets_requests_end_first(server: Server, level: int) -> None:
    running = streams(server, 3, 600)
    asking = Asking(server, f"/sleep?level={level}&mode=wait")
    eventually(lambda: sleep_state(server) == "falling_asleep")
    texts(running)
    assert asking.answer().json()["level"] == level


@pytest.mark.parametrize("level", SOME_LEVELS)
def test_mode_abort_ends_them_with_what_they_have(server: Server, level: int) -> None:
    running = [*streams(server, 3, 3000), Stream(server, 3000, stream=False)]
    eventually(lambda: server.metric("ullm_num_requests_running") == 4)
    assert server.admin("POST", "/sleep", {"level": level, "mode": "abort"}).json()["state"] == "asleep"
    for stream in running:
        stream.join()
        assert (stream.status, stream.finish_reason, stream.failure) == (200, "abort", None)
        assert stream.usage is not None
    assert all(stream.text for stream in running[:3])


@pytest.mark.parametrize("level", SOME_LEVELS)
def test_mode_keep_goes_on_after_the_wake(server: Server, level: int) -> None:
    undisturbed = texts(streams(server, 3, 100))
    running = streams(server, 3, 100)
    assert server.admin("POST", "/sleep", {"level": level, "mode": "keep"}).json()["state"] == "asleep"
    said = [stream.chunks for stream in running]
    assert sleep_state(server) == "asleep", "nobody but a new request wakes it"
    assert all(not stream.ended.is_set() for stream in running)
    server.admin("POST", "/wake")
    assert texts(running) == undisturbed
    assert all(stream.chunks > before for stream, before in zip(running, said, strict=True))


def test_asking_twice_changes_nothing_and_deeper_levels_may_follow(server: Server) -> None:
    wakes = server.metric("ullm_wakes_total")
    assert server.admin("POST", "/wake").json()["state"] == "awake"
    asked = [0, 0, 1, 1, 0, 2, 1, 3, 3, 0]
    found = [server.admin("POST", "/sleep", {"level": level}).json()["level"] for level in asked]
    assert found == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [server.admin("POST", "/wake").json()["state"] for _ in range(2)] == ["awake", "awake"]
    assert server.metric("ullm_wakes_total") == wakes + 1
    assert server.complete(max_tokens=5).status_code == 200


def test_many_who_ask_at_the_same_time(server: Server) -> None:
    """Sleeps, wakes and requests all at once: each is answered, each request is served."""
    undisturbed = texts(streams(server, 4, 50))
    asking = [
        Asking(server, "/sleep" if number % 2 else "/wake", {"level": number % 4} if number % 2 else None)
        for number in range(12)
    ]
    running = [Stream(server, 50, [300 + number]) for number in range(4)]
    assert {one.answer().status_code for one in asking} <= {200, 409}
    assert texts(running) == undisturbed
    server.admin("POST", "/wake")
    assert server.state() == "running"


def test_a_wake_calls_off_a_sleep_that_waits(server: Server) -> None:
    running = streams(server, 2, 200)
    asking = Asking(server, "/sleep", {"level": 2})
    eventually(lambda: sleep_state(server) == "falling_asleep")
    assert server.admin("POST", "/wake").json()["state"] == "awake"
    assert asking.answer().status_code == 409
    texts(running)
    assert sleep_state(server) == "awake"


def test_a_late_request_waits_for_the_sleep_and_wakes_it(serve: Serve, scripted_model: Path) -> None:
    """It arrives while the engine falls asleep: behind those that are waited for, and never lost."""
    server = serve("--model", str(scripted_model), *SCRIPTED, "--replicas", "2")
    running = streams(server, 4, 150)
    asking = Asking(server, "/sleep", {"level": 1})
    eventually(lambda: sleep_state(server) == "falling_asleep")
    late = Stream(server, 20)
    assert not late.begun.is_set()
    texts(running)
    assert asking.answer().status_code == 200
    texts([late])
    assert server.metric("ullm_wakes_total") == 1


@pytest.mark.parametrize("level", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_it_falls_asleep_when_it_is_idle(
    serve: Serve, scripted_model: Path, transport: tuple[str, str], level: int
) -> None:
    options = ("--sleep-after", "0.4", "--sleep-level", str(level))
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport, *options)
    for _ in range(2):
        (stream,) = streams(server, 1, 160)
        assert sleep_state(server) == "awake"
        texts([stream])
        ended = time.monotonic()
        eventually(lambda: sleep_state(server) == "asleep", seconds=20)
        assert time.monotonic() - ended > 0.3
        assert server.get("/is_sleeping").json()["level"] == level


@pytest.mark.parametrize("level", SOME_LEVELS)
def test_a_worker_killed_asleep_is_replaced_by_one_that_sleeps(server: Server, level: int) -> None:
    undisturbed = texts(streams(server, 2, 50))
    running = streams(server, 2, 50)
    server.admin("POST", "/sleep", {"level": level, "mode": "keep"})
    for worker in server.workers():
        worker.kill()
    assert texts([*streams(server, 2, 50), *running]) == undisturbed * 2


def test_a_worker_that_dies_waking_up_costs_nothing(server: Server) -> None:
    restarts = server.metric("ullm_worker_restarts_total")
    undisturbed = texts(streams(server, 2, 50))
    server.admin("POST", "/admin/faults", {"plan": "worker.wake:crash"})
    server.admin("POST", "/sleep", {"level": 1})
    assert texts(streams(server, 2, 50)) == undisturbed
    assert server.metric("ullm_worker_restarts_total") == restarts + 1


@pytest.mark.parametrize(
    ("body", "param"), [({"level": 4}, "level"), ({"level": -1}, "level"), ({"mode": "soon"}, "mode")]
)
def test_what_makes_no_sense(scripted_server: Server, body: dict[str, Any], param: str) -> None:
    refused = scripted_server.admin("POST", "/sleep", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert sleep_state(scripted_server) == "awake"
