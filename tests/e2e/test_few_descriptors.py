"""Few file descriptors, and clients that take one each and say nothing."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import h2.connection
import h2.settings
import pytest

from tests.support.server import SCRIPTED, Serve, Server
from tests.support.streams import streams, texts
from tests.support.waiting import eventually

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform == "win32", reason="has no ulimit")]

DESCRIPTORS = 96
CLIENTS = 200


@contextmanager
def silent_clients(server: Server, count: int) -> Iterator[None]:
    """Connections of which every other one sends half of a request."""
    address = urlsplit(server.url)
    with ExitStack() as stack:
        for number in range(count):
            sock = stack.enter_context(socket.create_connection((address.hostname, address.port)))
            if number % 2:
                sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-")
        yield


def test_a_lost_worker_is_replaced_and_clients_are_served(serve: Serve, scripted_model: Path) -> None:
    own = f"{sys.executable} -m ullm serve --port 0 --model {scripted_model} {' '.join(SCRIPTED)}"
    server = serve(command=["sh", "-c", f"ulimit -n {DESCRIPTORS}; exec {own} --standby-workers 0"])
    undisturbed = texts(streams(server, 4, 300))
    running = streams(server, 4, 300)
    first = server.worker()
    with silent_clients(server, CLIENTS):
        server.hear("as many connections as descriptors allow")
        first.kill()
        assert texts(running) == undisturbed
        eventually(lambda: server.worker().pid != first.pid)
        assert texts(streams(server, 4, 20))
    assert "Too many open files" not in server.errors()


def test_the_soft_limit_is_raised(serve: Serve, scripted_model: Path) -> None:
    own = f"{sys.executable} -m ullm serve --port 0 --model {scripted_model} {' '.join(SCRIPTED)}"
    server = serve(command=["sh", "-c", f"ulimit -S -n {DESCRIPTORS}; exec {own}"])
    with silent_clients(server, CLIENTS):
        assert texts(streams(server, 4, 20))
    assert "descriptors" not in server.errors()


def test_clients_of_http2_without_a_window_leave_nothing_behind(serve: Serve, scripted_model: Path) -> None:
    """Each asks for a stream that it never lets through, and leaves."""
    own = f"{sys.executable} -m ullm serve --port 0 --http2 --model {scripted_model} {' '.join(SCRIPTED)}"
    server = serve(command=["sh", "-c", f"ulimit -n {DESCRIPTORS}; exec {own} --standby-workers 0"])
    address = urlsplit(server.url)
    body = b'{"prompt": [300], "max_tokens": 500, "ignore_eos": true, "stream": true}'
    for _ in range(150):
        http = h2.connection.H2Connection()
        http.local_settings.update({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        http.local_settings.acknowledge()
        http.initiate_connection()
        head = {":method": "POST", ":path": "/v1/completions", ":scheme": "http", ":authority": "localhost"}
        http.send_headers(1, [*head.items(), ("content-type", "application/json")])
        http.send_data(1, body, end_stream=True)
        with socket.create_connection((address.hostname, address.port)) as sock, suppress(ConnectionError):
            sock.sendall(http.data_to_send())
            sock.recv(1)
    eventually(lambda: server.metric("ullm_num_requests_running") == 0)
    assert texts(streams(server, 4, 20))
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
