"""Standby workers of a real server: that they take over, come and go unnoticed, and are never left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.server import SCRIPTED, Serve, Server, is_gone
from tests.support.streams import streams, texts
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX"),
]

TOKENS = 200


def serving(server: Server) -> set[int]:
    """Process ids of the workers in service."""
    return {pid for replica in server.replicas() for pid in replica["worker_pids"]}


def standbys(server: Server) -> list[psutil.Process]:
    """Worker processes that serve nobody."""
    return [process for process in server.workers() if process.pid not in serving(server)]


def prepared(server: Server) -> psutil.Process:
    """The one standby, when it is prepared."""
    server.hear("standby worker prepared")
    (standby,) = standbys(server)
    return standby


def test_a_standby_takes_the_place_of_a_killed_worker(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--log-level", "debug")
    undisturbed = texts(streams(server, 4, TOKENS))
    standby = prepared(server)
    running = streams(server, 4, TOKENS)
    server.worker().kill()
    assert texts(running) == undisturbed
    assert server.worker() == standby
    assert f"pid={standby.pid}" in server.hear("standby worker takes over .*")
    assert server.metric("ullm_standby_taken_total") == 1
    eventually(lambda: [process for process in standbys(server) if process != standby])
    eventually(lambda: server.metric('ullm_standby_workers{state="prepared"}') == 1)


def test_a_killed_standby_is_replaced_and_nobody_notices(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--log-level", "debug")
    standby, worker = prepared(server), server.worker()
    running = streams(server, 2, TOKENS)
    assert server.metric('ullm_standby_workers{state="prepared"}') == 1
    standby.kill()
    eventually(lambda: [process for process in standbys(server) if process != standby])
    assert server.metric("ullm_standby_lost_total") == 1
    assert server.metric("ullm_standby_taken_total") == 0
    texts(running)
    assert server.worker() == worker
    assert server.metric("ullm_worker_restarts_total") == 0
    assert "was killed by SIGKILL" in server.hear("standby worker lost .*")


def test_a_killed_server_leaves_no_standby(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--log-level", "debug")
    standby = prepared(server)
    server.signal(signal.SIGKILL)
    server.wait()
    eventually(lambda: is_gone(standby), seconds=1)


def test_a_stop_ends_standbys_in_order(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--log-level", "debug")
    prepared(server)
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert time.monotonic() - began < 2
    assert "standby worker lost" not in server.errors()


def test_a_stop_does_not_wait_for_a_standby_in_preparation(serve: Serve, scripted_model: Path) -> None:
    runner = ("--load-format", "dummy", "--runner", "slow_to_prepare:Runner")
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    server = serve("--model", str(scripted_model), *runner, "--log-level", "debug", environ=path)
    server.hear("preparing for a minute")
    assert len(standbys(server)) == 1
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert time.monotonic() - began < 2


def test_a_server_asleep_has_no_standbys(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--log-level", "debug")
    standby = prepared(server)
    assert server.admin("POST", "/sleep", {"level": 1}).status_code == 200
    assert is_gone(standby)
    assert server.admin("POST", "/wake").status_code == 200
    eventually(lambda: standbys(server))


@pytest.mark.parametrize(
    "options", [("--standby-workers", "0"), pytest.param(("--transport", "thread"), marks=pytest.mark.slow)]
)
def test_without_standby_workers(serve: Serve, scripted_model: Path, options: tuple[str, ...]) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, *options)
    texts(streams(server, 1, 2 * TOKENS))
    assert standbys(server) == []


@pytest.mark.slow
def test_as_many_as_configured(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--standby-workers", "2")
    eventually(lambda: len(standbys(server)) == 2)
    first = server.worker()
    first.kill()
    eventually(lambda: serving(server) - {first.pid})
    eventually(lambda: len(standbys(server)) == 2)
