"""A replica whose ranks are on two hosts: this one, and a network namespace at the end of a cable."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.server import Serve, Server, is_gone
from tests.support.streams import Stream, streams, texts, wait_begun
from tests.support.waiting import eventually

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOKENS = 200
JOINED = r"(workers of) --node-rank"
RANKS = ("--dtype", "float32", "--node-timeout", "2", "--max-restarts", "20")


class OtherHost:
    """A network namespace, and the cable to it."""

    def __init__(self) -> None:
        number = secrets.randbelow(200) + 20
        self.name = f"ullm{os.getpid()}"
        self.here, self.there = f"10.231.{number}.1", f"10.231.{number}.2"
        self._near = f"u{os.getpid()}a"
        far = f"u{os.getpid()}b"
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self._near, "type", "veth", "peer", "name", far, "netns", self.name)
        _run("ip", "addr", "add", f"{self.here}/24", "dev", self._near)
        self.command = ("ip", "netns", "exec", self.name)
        _run(*self.command, "ip", "addr", "add", f"{self.there}/24", "dev", far)
        for device in ("lo", far):
            _run(*self.command, "ip", "link", "set", device, "up")
        self.plug_in()

    def plug_in(self) -> None:
        _run("ip", "link", "set", self._near, "up")

    def unplug(self) -> None:
        _run("ip", "link", "set", self._near, "down")

    def remove(self) -> None:
        _run("ip", "link", "del", self._near)
        _run("ip", "netns", "del", self.name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def other_host() -> Iterator[OtherHost]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs Linux, root and ip (iproute2)")
    try:
        host = OtherHost()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield host
    host.remove()


class Cluster:
    """An engine here, and its agent there."""

    def __init__(self, serve: Serve, model: Path, host: OtherHost, folder: Path, *size: str) -> None:
        secret = folder / "secret"
        secret.write_text(secrets.token_hex(32))
        secret.chmod(0o600)
        self._serve, self._host = serve, host
        self.model = ("--model", str(model), *RANKS, *size)
        hosts = ("--nnodes", "2", "--master-addr", host.here, "--node-secret-file", str(secret))
        self.options = (*self.model, *hosts)
        self.agent = self.start_agent()
        self.server = serve(*self.options)

    def start_agent(self) -> Server:
        command = [*self._host.command, sys.executable, "-m", "ullm", "serve"]
        return self._serve(*self.options, "--node-rank", "1", command=command, ready=JOINED, wait=False)


def open_to_others(server: Server) -> set[tuple[str, int]]:
    """Where the engine listens, other than on loopback; its ranks have ports of Gloo's there, too."""
    connections = psutil.Process(server.process.pid).net_connections("inet")
    found = [c for c in connections if c.status == "LISTEN"]
    return {(c.laddr.ip, c.laddr.port) for c in found if not c.laddr.ip.startswith("127.")}


def knock(host: str, port: int) -> bytes:
    """What somebody gets who takes it for a web server."""
    received = b""
    with socket.create_connection((host, port), timeout=10) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(ConnectionResetError):
            while data := stranger.recv(4096):
                received += data
    return received


def test_ranks_on_two_hosts(serve: Serve, tiny_model: Path, other_host: OtherHost, tmp_path: Path) -> None:
    size = ("--tp-size", "2")
    alone = serve("--model", str(tiny_model), "--dtype", "float32", *size, "--standby-workers", "0")
    undisturbed = texts(streams(alone, 3, TOKENS))
    assert alone.close() == 0
    cluster = Cluster(serve, tiny_model, other_host, tmp_path, *size)
    server = cluster.server
    assert list(server.get("/health").json()["hosts"]) == ["1"]
    assert texts(streams(server, 3, TOKENS)) == undisturbed

    # A rank there is killed: the agent tells, and starts it again.
    running = wait_begun([Stream(server, TOKENS, [300 + each]) for each in range(3)])
    eventually(lambda: len(cluster.agent.workers()) == 1)
    cluster.agent.workers()[0].send_signal(signal.SIGKILL)
    assert texts(running) == undisturbed
    server.hear(r"cause=WorkerLost: replica0\.rank1 was killed by SIGKILL")

    # The host is killed, its workers with it, and another agent comes in its place.
    running = wait_begun([Stream(server, TOKENS, [300 + each]) for each in range(3)])
    workers = cluster.agent.workers()
    cluster.agent.signal(signal.SIGKILL)
    cluster.agent.wait()
    eventually(lambda: all(map(is_gone, workers)), seconds=5)
    cluster.agent = cluster.start_agent()
    assert texts(running) == undisturbed

    # The cable is out for longer than --node-timeout: no host hears the other, and each ends what is useless.
    running = wait_begun([Stream(server, TOKENS, [300 + each]) for each in range(3)])
    other_host.unplug()
    server.hear(r"a host was lost.*gave no sign of life for 2 s")
    cluster.agent.hear("the engine was lost, its workers here have ended")
    other_host.plug_in()
    assert texts(running) == undisturbed

    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert cluster.agent.wait() == 0


def test_a_host_of_its_own_for_each_replica(
    serve: Serve, tiny_model: Path, other_host: OtherHost, tmp_path: Path
) -> None:
    cluster = Cluster(serve, tiny_model, other_host, tmp_path, "--replicas", "2")
    server = cluster.server
    undisturbed = texts(streams(server, 4, TOKENS))
    running = wait_begun([Stream(server, TOKENS, [300 + each]) for each in range(4)])
    cluster.agent.signal(signal.SIGTERM)  # it leaves at once: the engine does not drain
    assert cluster.agent.wait() == 0
    assert texts(running) == undisturbed
    assert [replica["up"] for replica in server.replicas()] == [True, False]
    # Hosts that are asked to stop together, the agent first: the streams finish.
    cluster.agent = cluster.start_agent()
    eventually(lambda: server.replicas()[1]["up"])
    running = wait_begun([Stream(server, TOKENS, [300 + each]) for each in range(4)])
    cluster.agent.signal(signal.SIGTERM)
    server.signal(signal.SIGTERM)
    assert texts(running) == undisturbed
    assert (server.wait(), cluster.agent.wait()) == (0, 0)


def test_kv_is_handed_over_between_hosts(
    serve: Serve, tiny_model: Path, other_host: OtherHost, tmp_path: Path
) -> None:
    """Here the prompts, there the tokens after them; then the cable is out amid hand-overs."""
    prompts = [[300 + number, *(310 + place % 90 for place in range(300))] for number in range(4)]
    alone = serve("--model", str(tiny_model), "--dtype", "float32", "--standby-workers", "0")
    undisturbed = texts([Stream(alone, TOKENS, prompt) for prompt in prompts])
    assert alone.close() == 0
    apart = ("--replicas", "2", "--roles", "prefill,decode", "--prefill-threshold", "100")
    cluster = Cluster(serve, tiny_model, other_host, tmp_path, *apart)
    server = cluster.server
    assert texts([Stream(server, TOKENS, prompt) for prompt in prompts]) == undisturbed
    assert server.metric('ullm_kv_handovers_total{outcome="moved"}') == len(prompts)
    assert server.metric("ullm_kv_handover_blocks_total") >= len(prompts) * (301 // 16)

    fault = {"plan": "handover.chunk:delay@seconds=9,times=2"}
    assert server.admin("POST", "/admin/faults", fault).status_code == 200
    salted = [Stream(server, TOKENS, prompt, cache_salt="again") for prompt in prompts]
    running = wait_begun(salted)
    eventually(lambda: len(server.admin("GET", "/admin/faults").json()["fired"]) == 2)
    other_host.unplug()
    server.hear(r"a host was lost.*gave no sign of life for 2 s")
    assert texts(running) == undisturbed
    assert server.metric('ullm_kv_handovers_total{outcome="lost"}') >= 2
    other_host.plug_in()
    eventually(lambda: server.replicas()[1]["up"])


def test_the_engine_is_killed_and_comes_back(
    serve: Serve, tiny_model: Path, other_host: OtherHost, tmp_path: Path
) -> None:
    cluster = Cluster(serve, tiny_model, other_host, tmp_path, "--pp-size", "2")
    undisturbed = texts(streams(cluster.server, 2, 50))
    assert open_to_others(cluster.server) == {(other_host.here, 29501)}
    assert b"HTTP" not in knock(other_host.here, 29501)
    cluster.server.hear(r"a host was refused.*that was no handshake")
    workers = cluster.agent.workers()
    cluster.server.signal(signal.SIGKILL)
    cluster.server.wait()
    eventually(lambda: all(map(is_gone, workers)), seconds=5)
    again = serve(*cluster.options)
    assert texts(streams(again, 2, 50)) == undisturbed
