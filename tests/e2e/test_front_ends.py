"""Front ends apart from the engine, as processes: one is lost, stopped, or absent, and the other goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.link_files import make_link_files
from tests.support.server import ENVIRON, SCRIPTED, Serve, Server, is_gone
from tests.support.streams import Stream, streams, texts
from tests.support.waiting import eventually
from ullm.system.interpreter import python_command

pytestmark = pytest.mark.process

TOKENS = 300
ENGINE_READY = r"^ready: front ends connect to (\S+),"
KEY = "a key of the tests, long enough"


def parts(server: Server, kind: str) -> list[psutil.Process]:
    """The processes that a launcher has started: ``engine`` or ``front-end``."""
    found = []
    for child in psutil.Process(server.process.pid).children():
        line = [] if is_gone(child) else child.cmdline()
        if "ullm.cli.launched" in line and line[-1].startswith(kind):
            found.append(child)
    return found


def part(server: Server, kind: str) -> psutil.Process:
    """Such a process that runs, once there is one."""
    eventually(lambda: parts(server, kind))
    return parts(server, kind)[0]


def clients_of(process: psutil.Process) -> int:
    """Connections of clients that a front end has."""
    return sum(each.status == psutil.CONN_ESTABLISHED for each in process.net_connections("tcp"))


@pytest.fixture
def launched(serve: Serve, scripted_model: Path) -> Server:
    """An engine and two front ends on one port."""
    return serve("--model", str(scripted_model), *SCRIPTED, "--api-server-count", "2")


def start_engine(serve: Serve, model: Path, listen: str, *options: str, wait: bool = True) -> Server:
    """Start an engine without an API."""
    command = python_command("-m", "ullm", "serve", "--headless", "--listen", listen)
    arguments = ("--model", str(model), *SCRIPTED, *options)
    return serve(*arguments, command=command, ready=ENGINE_READY, wait=wait)


def streams_on_both(server: Server, count: int, max_tokens: int) -> tuple[list[Stream], list[Stream]]:
    """Start streams on either front end: while one of them is suspended, it accepts nothing."""
    first, second = parts(server, "front-end")
    second.suspend()
    ours = streams(server, count, max_tokens)
    second.resume()
    first.suspend()
    theirs = streams(server, count, max_tokens)
    first.resume()
    assert clients_of(first) == clients_of(second) == count
    return ours, theirs


def test_the_engine_is_killed_behind_two_front_ends(launched: Server) -> None:
    undisturbed = texts(streams(launched, 4, TOKENS))
    running, others = streams_on_both(launched, 4, TOKENS)
    part(launched, "engine").kill()
    late = Stream(launched, 20)
    assert texts(running) == texts(others) == undisturbed
    texts([late])
    assert all(stream.chunks <= TOKENS for stream in running + others)
    sys.stdout.write(f"longest gap: {max(stream.gap for stream in running + others):.2f} s\n")
    assert launched.get("/ready").status_code == 200
    eventually(lambda: len(parts(launched, "engine")) == 1)


def test_a_front_end_is_killed(launched: Server) -> None:
    undisturbed = texts(streams(launched, 2, TOKENS))
    lost, kept = streams_on_both(launched, 2, TOKENS)
    parts(launched, "front-end")[0].kill()
    assert all(stream.join().error is not None for stream in lost)
    assert texts(kept) == undisturbed
    eventually(lambda: len(parts(launched, "front-end")) == 2)
    eventually(lambda: launched.metric("ullm_num_requests_running") == 0)
    texts([Stream(launched, 20)])


def test_a_stop_drains_through_all_of_them(launched: Server) -> None:
    undisturbed = texts(streams(launched, 4, TOKENS))
    running, others = streams_on_both(launched, 4, TOKENS)
    launched.signal(signal.SIGTERM)
    assert texts(running) == texts(others) == undisturbed
    assert launched.wait() == 0


def test_the_launcher_is_killed(launched: Server) -> None:
    running = streams(launched, 4, TOKENS)
    below = launched.children()
    launched.process.kill()
    texts(running)
    eventually(lambda: all(is_gone(process) for process in below))


def test_an_engine_that_is_stopped_drains_and_another_one_goes_on(
    serve: Serve, scripted_model: Path, tmp_path: Path
) -> None:
    """By hand: the front end is there first, and outlives its engine."""
    link = f"unix:{tmp_path}/engine"
    front_end = serve("--connect", link, wait=False)
    front_end.find_url()
    assert front_end.get("/live").status_code == 200
    early = front_end.get("/ready")
    assert (early.status_code, early.json()["state"]) == (503, "starting")
    refused = front_end.complete(max_tokens=2)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    first = start_engine(serve, scripted_model, link)
    assert (tmp_path / "engine").stat().st_mode & 0o777 == 0o600
    front_end.wait_ready()
    undisturbed = texts(streams(front_end, 2, TOKENS))
    running = streams(front_end, 2, TOKENS)
    first.signal(signal.SIGTERM)
    assert texts(running) == undisturbed
    assert first.wait() == 0
    eventually(lambda: front_end.get("/health").json()["state"] == "restarting")
    waiting = Stream(front_end, 20)
    start_engine(serve, scripted_model, link)
    texts([waiting])
    asked = front_end.request("POST", "/v1/responses", {"input": "1", "background": True})
    assert (asked[0], asked[1]["error"]["code"]) == (400, "answers_not_kept")


@pytest.mark.slow
def test_a_stranger_is_not_let_in(serve: Serve, scripted_model: Path, tmp_path: Path) -> None:
    """Neither without the key nor with another one, and each says so in one line."""
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    engine = start_engine(serve, scripted_model, "127.0.0.1:0", "--engine-key-file", str(key))
    for environ, line in (
        ({}, "the engine wants a key; set --engine-key-file or ULLM_ENGINE_KEY to the engine's"),
        (
            {"ULLM_ENGINE_KEY": KEY[::-1]},
            "the front end does not know the engine's key; give both the same one",
        ),
    ):
        command = python_command("-m", "ullm", "serve", "--port", "0", "--connect", engine.url)
        done = subprocess.run(
            command, env={**os.environ, **ENVIRON, **environ}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert f"error: {engine.url}: {line}" in done.stderr
    front_end = serve("--connect", engine.url, environ={"ULLM_ENGINE_KEY": KEY})
    texts([Stream(front_end, 20)])


@pytest.mark.slow
def test_between_hosts_certificates_let_in(serve: Serve, scripted_model: Path, tmp_path: Path) -> None:
    """No key is needed then; a certificate of another authority, and none, are refused in one line."""
    ours, others = (make_link_files(tmp_path / name) for name in ("ours", "others"))
    engine = start_engine(serve, scripted_model, "127.0.0.1:0", *ours.flags())
    for flags, line in (
        (others.flags(ours.authority), "the other end does not accept this one's certificate (unknown ca)"),
        (others.flags(), "the other end's certificate is not accepted: "),
    ):
        command = python_command("-m", "ullm", "serve", "--port", "0", "--connect", engine.url, *flags)
        done = subprocess.run(
            command, env={**os.environ, **ENVIRON}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert f"error: {engine.url}: {line}" in done.stderr
    plain = serve("--connect", engine.url, wait=False)
    engine.hear("front end turned away .*does not speak TLS|front end turned away .*no TLS handshake")
    plain.signal(signal.SIGTERM)
    front_end = serve("--connect", engine.url, *ours.flags())
    texts([Stream(front_end, 20)])


@pytest.mark.slow
@pytest.mark.parametrize("worker_class", ["asyncio", "trio"])
def test_workers_of_hypercorn_share_an_engine(
    serve: Serve, scripted_model: Path, tmp_path: Path, worker_class: str
) -> None:
    link = f"unix:{tmp_path}/engine"
    engine = start_engine(serve, scripted_model, link)
    command = [sys.executable, "-m", "hypercorn", "-k", worker_class, "-w", "2", "-b", "127.0.0.1:0"]
    host = serve(
        command=[*command, "ullm.app:app"],
        environ={"ULLM_CONNECT": link, "ULLM_ADMIN_LISTEN": ""},
        ready=r"Running on (http://\S+)",
    )
    undisturbed = texts(streams(host, 8, TOKENS))
    running = streams(host, 8, TOKENS)
    engine.process.kill()
    eventually(lambda: not any(not is_gone(worker) for worker in engine.workers()))
    start_engine(serve, scripted_model, link)
    assert texts(running) == undisturbed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--headless",), "--headless needs --listen"),
        (("--listen", "unix:/x"), "--listen needs --headless"),
        (("--headless", "--listen", "unix:/x", "--port", "1"), "--port has no effect with --headless"),
        (("--headless", "--listen", "0.0.0.0:0"), "whoever reaches this port could run requests"),
        (("--headless", "--listen", "nowhere"), "expected unix:PATH or HOST:PORT"),
        (("--connect", "unix:/x", "--max-bs", "3"), "--max-bs has no effect with --connect"),
        (("--connect", "unix:/x", "--api-server-count", "2"), "exclude each other"),
        (("--connect", "unix:/x", "--journal", "/x"), "--journal has no effect with --connect"),
        (("--answers", "unix:/x"), "--answers needs --connect"),
        (("--connect", "unix:/x", "--answers", "127.0.0.1:1"), "--answers 127.0.0.1:1: expected unix:PATH"),
        (
            ("--connect", "unix:/x", "--answers-listen", "unix:/y", "--api-key", "k"),
            "--api-key has no effect with --answers-listen",
        ),
        (
            ("--connect", "unix:/x", "--answers", "unix:/y", "--answers-listen", "unix:/z"),
            "--answers and --answers-listen exclude each other",
        ),
    ],
)
def test_options_that_do_not_fit(arguments: tuple[str, ...], line: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ULLM_")}
    command = python_command("-m", "ullm", "serve", *arguments)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.search(re.escape(line), done.stderr)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
