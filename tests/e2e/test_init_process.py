"""Process 1 of a container without an init, in a namespace of processes of its own. Needs root, and Linux."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.server import SCRIPTED, Serve, Server
from tests.support.waiting import eventually

NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def is_possible() -> bool:
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("nsenter"):
        return False
    return subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not is_possible(), reason="needs root, unshare and nsenter"),
]


def first_process(server: Server) -> psutil.Process:
    """Process 1, as the machine sees it."""
    (first,) = psutil.Process(server.process.pid).children()
    return first


def leave_orphans(first: psutil.Process, count: int) -> None:
    """Start processes whose parents end before them, as an exec into the container does."""
    commands = "sleep 0.1 & " * count
    inside = ["nsenter", "--target", str(first.pid), "--pid", "--mount"]
    subprocess.run([*inside, "sh", "-c", commands], check=True, timeout=60)


def orphans(first: psutil.Process) -> list[psutil.Process]:
    """Return what is left of them, zombies too, at any depth."""
    found = []
    for each in first.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if each.name() == "sleep" or each.status() == psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def test_orphans_are_reaped_and_signals_passed_on(serve: Serve, scripted_model: Path) -> None:
    own = [sys.executable, "-m", "ullm", "serve", "--port", "0", "--model", str(scripted_model), *SCRIPTED]
    server = serve(command=[*NAMESPACE, *own, "--standby-workers", "0"])
    first = first_process(server)
    leave_orphans(first, 20)
    eventually(lambda: not orphans(first))
    assert server.complete(max_tokens=3).status_code == 200
    # A worker's end is still told to the one who waits for it.
    (program,) = first.children()
    (worker,) = server.workers()
    worker.kill()
    eventually(lambda: worker.pid not in {each.pid for each in program.children()})
    assert server.complete(max_tokens=3).status_code == 200
    assert "was killed by SIGKILL" in server.errors()
    first.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "stopped" in server.errors()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--port", "99999"], 2), (["--model", "nowhere.gguf"], 1), (["--no-such-option"], 2), (["--help"], 0)],
)
def test_its_exit_status_is_the_programs(arguments: list[str], status: int) -> None:
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-m", "ullm", "serve", *arguments],
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == status
