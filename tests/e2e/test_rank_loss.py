"""A replica of several ranks loses one of them: its streams go on, and nothing is left of the others."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.support.server import Serve, Server, is_gone
from tests.support.streams import Stream, streams, texts, wait_begun
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX"),
]

TOKENS = 300
LONGEST_GAP = {signal.SIGKILL: 2.0, signal.SIGSTOP: 5.0}
"""Seconds, on a machine that other tests keep busy. Alone: 0.3 s, and 1.5 s with SIGSTOP, of which it takes
one to be sure that the process is suspended."""
RANKS = ("--dtype", "float32")
TWO = {"tp": ("--tp-size", "2"), "pp": ("--pp-size", "2")}


def ranks(server: Server) -> list[psutil.Process]:
    """The ranks of the only replica, when it is up."""
    eventually(lambda: server.replicas()[0]["up"])
    return [psutil.Process(pid) for pid in server.replicas()[0]["worker_pids"]]


def listening(processes: list[psutil.Process]) -> set[str]:
    """Where these listen."""
    found = [c for process in processes for c in process.net_connections("inet") if c.status == "LISTEN"]
    return {f"{c.laddr.ip}:{c.laddr.port}" for c in found}


@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_go_on_after_the_loss_of_any_rank(
    serve: Serve, tiny_model: Path, kind: str, number: signal.Signals
) -> None:
    server = serve("--model", str(tiny_model), *RANKS, *TWO[kind])
    undisturbed = texts(streams(server, 3, TOKENS))
    for index in range(2):
        eventually(lambda: server.metric('ullm_standby_workers{state="prepared"}') == 2)
        before = ranks(server)
        assert len(before) == 2
        running = wait_begun([Stream(server, TOKENS, [300 + each]) for each in range(3)])
        before[index].send_signal(number)
        assert texts(running) == undisturbed
        gap = max(stream.gap for stream in running)
        logging.getLogger(__name__).info("%s, rank %d, %s: longest gap %.3f s", kind, index, number.name, gap)
        assert gap < LONGEST_GAP[number]
        assert all(map(is_gone, before))
        assert not {process.pid for process in before} & {process.pid for process in ranks(server)}
        cause = "was killed by SIGKILL" if number == signal.SIGKILL else "was suspended"
        server.hear(rf"cause=WorkerLost: replica0\.rank{index} {cause}")


def test_ranks_that_run_through_transformers_code(serve: Serve, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-relu"
    shutil.copytree(tiny_model, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "relu"}))
    undisturbed = texts(streams(serve("--model", str(folder), *RANKS), 3, TOKENS))
    server = serve("--model", str(folder), *RANKS, *TWO["tp"])
    assert texts(streams(server, 3, TOKENS)) == undisturbed
    before = ranks(server)
    running = wait_begun([Stream(server, TOKENS, [300 + each]) for each in range(3)])
    before[1].kill()
    assert texts(running) == undisturbed
    assert all(map(is_gone, before))


def test_two_servers_on_one_host_do_not_meet(serve: Serve, tiny_model: Path) -> None:
    options = ("--model", str(tiny_model), *RANKS, *TWO["tp"], "--standby-workers", "0")
    servers = [serve(*options, wait=False) for _ in range(2)]
    for server in servers:
        server.wait_ready()
    first, second = (streams(server, 2, 50) for server in servers)
    assert texts(first) == texts(second)
    places = [listening(ranks(server)) for server in servers]
    assert not places[0] & places[1]
    assert {place.rpartition(":")[0] for place in places[0] | places[1]} == {"127.0.0.1"}


def test_ranks_end_with_a_killed_engine(serve: Serve, tiny_model: Path) -> None:
    server = serve("--model", str(tiny_model), *RANKS, "--tp-size", "2", "--pp-size", "2")
    running = wait_begun([Stream(server, TOKENS)])
    workers = server.workers()
    assert len(workers) >= 4
    server.signal(signal.SIGKILL)
    server.wait()
    eventually(lambda: all(map(is_gone, workers)), seconds=2)
    for stream in running:
        stream.join()


def test_a_stop_destroys_groups_in_order(serve: Serve, tiny_model: Path) -> None:
    server = serve("--model", str(tiny_model), *RANKS, "--tp-size", "2", "--pp-size", "2")
    texts(streams(server, 2, 20))
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "0 killed, 0 abandoned" in server.errors().splitlines()[-1]


def test_a_port_that_is_taken_is_named(serve: Serve, tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ("--model", str(tiny_model), *RANKS, *TWO["tp"], "--nccl-port", str(port))
        server = serve(*options, wait=False)
        assert server.wait() == 1
    assert f"--nccl-port: the ranks cannot meet at 127.0.0.1:{port}: Address already" in server.errors()


@pytest.mark.parametrize(
    ("option", "size", "says"),
    [
        (
            "--tp-size",
            "5",
            "the model's 4 attention heads cannot be split over --tp-size 5; use a size of at most 4",
        ),
        ("--pp-size", "3", "the model's 2 layers cannot be split over --pp-size 3; use a size of at most 2"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(
    serve: Serve, tiny_model: Path, option: str, size: str, says: str
) -> None:
    server = serve("--model", str(tiny_model), *RANKS, option, size, wait=False)
    assert server.wait() == 1
    assert server.errors().splitlines()[-1] == f"error: {says}"
