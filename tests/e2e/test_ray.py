"""Ranks as Ray actors: a cluster of three nodes on this machine, of which one is killed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.server import Serve, is_gone
from tests.support.streams import Stream, streams, texts, wait_begun
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install '.[ray]'"),
]

TOKENS = 300
READY_SECONDS = 180.0
"""How long Ray may take to start a process per rank, each of which imports Ray and PyTorch: 40 s were seen,
beside other tests and with the niceness of 15 that Ray gives its workers."""
RANKS = ("--tp-size", "2", "--dtype", "float32", "--max-restarts", "20")


class Cluster:
    """Three nodes with a place for one rank each; its own files are in a folder of a short name.

    Attributes:
        address: for RAY_ADDRESS.
        nodes: a process of each node, from which its others descend; the first one is the head.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray"))
        script = str(Path(__file__).parent / "ray_cluster.py")
        self._process = subprocess.Popen(
            [sys.executable, script, str(self._folder), "3"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:  # its stderr says why
            self.close()
            pytest.fail("there is no cluster of Ray")
        found = json.loads(line)
        self.address: str = found["address"]
        self.nodes = [psutil.Process(pid) for pid in found["nodes"]]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        shutil.rmtree(self._folder)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


def ranks(node: psutil.Process) -> list[psutil.Process]:
    """The processes of ranks on a node."""
    if is_gone(node):
        return []
    return [child for child in node.children(recursive=True) if "RankActor" in "".join(child.cmdline())]


def test_a_node_that_is_lost_costs_a_pause(serve: Serve, tiny_model: Path, cluster: Cluster) -> None:
    model = ("--model", str(tiny_model), *RANKS)
    alone = serve(*model, "--standby-workers", "0")
    undisturbed = texts(streams(alone, 3, TOKENS))
    alone.close()

    ray = ("--transport", "ray", "--cpu-threads", "1")
    server = serve(*model, *ray, environ={"RAY_ADDRESS": cluster.address}, wait=False)
    server.wait_ready(READY_SECONDS)
    assert texts(streams(server, 3, TOKENS)) == undisturbed
    used = [node for node in cluster.nodes if ranks(node)]
    assert len(used) == 2
    running = wait_begun([Stream(server, TOKENS, [300 + each]) for each in range(3)])
    used[-1].kill()
    assert texts(running) == undisturbed
    # Either Ray says so first, or the other rank, whose connection is gone.
    server.hear(r"cause=Worker(Lost: replica0\.rank\d was lost by Ray|Failed: replica0\.rank\d failed)")

    running = wait_begun([Stream(server, TOKENS, [300 + each]) for each in range(3)])
    left = [process for node in cluster.nodes for process in ranks(node)]
    assert len(left) == 2
    server.signal(signal.SIGTERM)  # at which Ray would end the process at once
    assert texts(running) == undisturbed
    assert server.wait() == 0
    eventually(lambda: all(map(is_gone, left)))
