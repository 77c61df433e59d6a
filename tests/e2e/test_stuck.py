"""Servers whose event loop is stuck, or whose log nobody reads: they answer signals all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.support.server import SCRIPTED, Serve, Server
from tests.support.streams import Stream
from tests.support.waiting import eventually

pytestmark = [pytest.mark.process, pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")]


def stuck(serve: Serve, model: Path) -> Server:
    """A server whose event loop is blocked in a system call, as by a disk that does not answer."""
    server = serve(
        "--model", str(model), *SCRIPTED, "--shutdown-timeout", "0", "--faults", "scheduler.step:block"
    )
    Stream(server, 100)
    server.hear("fault injected")
    # Python answers a signal that comes just before a system call begins only when it returns.
    eventually(lambda: not answers(server))
    return server


def answers(server: Server) -> bool:
    try:
        httpx.get(f"{server.url}/live", timeout=1, verify=False)
    except httpx.TimeoutException:
        return False
    return True


def test_a_stuck_loop_is_left_at_the_deadline(serve: Serve, scripted_model: Path) -> None:
    server = stuck(serve, scripted_model)
    server.signal(signal.SIGTERM)
    assert server.wait() == 71
    assert "Threads that still run" in server.errors()


def test_a_stuck_loop_is_left_at_the_third_signal(serve: Serve, scripted_model: Path) -> None:
    server = stuck(serve, scripted_model)
    for _ in range(3):
        server.signal(signal.SIGTERM)
        time.sleep(0.2)  # signals of one kind that come at once are one, and nothing tells that one has come
    assert server.wait() in (143, 71)


def test_a_log_that_nobody_reads_holds_up_nothing(scripted_model: Path, tmp_path: Path) -> None:
    import fcntl

    command = [sys.executable, "-m", "ullm", "serve", "--port", "0", "--model", str(scripted_model)]
    options = [*SCRIPTED, "--log-level", "debug", "--shutdown-timeout", "3"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        fcntl.fcntl(process.stderr.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        url = process.stdout.readline().split()[1]
        for _ in range(100):  # some hundred bytes of log each
            body = {"prompt": [300], "max_tokens": 1}
            assert httpx.post(f"{url}/completions", json=body, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
