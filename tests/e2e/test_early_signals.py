"""Signals while a program still imports what it needs: answered as soon as Python can answer any."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.server import SCRIPTED

pytestmark = pytest.mark.process

PAUSE = """
import os, socket, sys

def pause():
    # Until the test has sent its signal, or closes the pipe.
    os.write(2, b"paused\\n")
    sys.stdin.readline()

class Pause:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("PAUSE_AT_IMPORT"):
            pause()

sys.meta_path.insert(0, Pause())
listen = socket.socket.listen

def pause_and_listen(sock, *arguments):
    if "PAUSE_AT_LISTEN" in os.environ and sock.family == socket.AF_UNIX:
        pause()
    return listen(sock, *arguments)

socket.socket.listen = pause_and_listen
"""
IMPORTS = "msgspec", "cyclopts", "quart_trio"
"""What the configuration, the command line and the server need."""
SERVE = ["-m", "ullm", "serve"]
OLD_SERVE = ["-m", "ullm.entrypoints.openai.api_server"]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts programs that pause in the middle of an import."""
    (tmp_path / "sitecustomize.py").write_text(PAUSE)
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, pause_at: str) -> subprocess.Popen[str]:
        environ = {**os.environ, "PYTHONPATH": str(tmp_path), "PAUSE_AT_IMPORT": pause_at}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
        )
        started.append(process)
        assert process.stderr is not None
        assert process.stderr.readline() == "paused\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("pause_at", IMPORTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [SERVE, pytest.param(OLD_SERVE, marks=pytest.mark.slow)])
def test_a_server_ends_in_order(
    start: Start, command: list[str], number: signal.Signals, pause_at: str
) -> None:
    server = start(*command, "--port", "0", pause_at=pause_at)
    server.send_signal(number)
    said, errors = server.communicate(timeout=60)
    assert server.returncode == 0
    assert errors == f"stopped by {number.name} before anything was started\n"
    assert said == ""


@pytest.mark.parametrize("pause_at", IMPORTS)
def test_a_hangup_does_not_end_a_server(start: Start, pause_at: str) -> None:
    """What it asks for, that the model be loaded again, is about to be done anyway."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start(*SERVE, "--port", str(taken.getsockname()[1]), pause_at=pause_at)
        server.send_signal(signal.SIGHUP)
        _, errors = server.communicate("go on\n", timeout=60)
    assert server.returncode == 1
    assert "in use" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_other_commands_end_as_when_they_run(start: Start, number: signal.Signals) -> None:
    command = start("-m", "ullm", "generate", "hello", pause_at="cyclopts")
    command.send_signal(number)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 128 + number
    assert errors == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_event_loop_runs_is_remembered(
    start: Start,
    scripted_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """Then there are files to remove, which an orderly stop does."""
    monkeypatch.setenv("PAUSE_AT_LISTEN", "")
    admin = ("--admin-listen", f"unix:{tmp_path / 'admin'}")
    server = start(*SERVE, "--port", "0", "--model", str(scripted_model), *SCRIPTED, *admin, pause_at="")
    server.send_signal(number)
    said, errors = server.communicate("go on\n", timeout=60)
    assert server.returncode == 0, errors
    assert f"signal={number.name} count=1" in errors
    assert "ready" not in said
    assert not (tmp_path / "admin").exists()
