"""Under a service manager: told how the server does, given sockets, and reached on a path."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.server import SCRIPTED, Serve
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd is Linux's"),
]

ACTIVATED = """
import os, socket, sys
tcp = socket.create_server(("127.0.0.1", 0))
unix = socket.socket(socket.AF_UNIX)
unix.bind(sys.argv[1])
unix.listen()
for number, sock in ((30, tcp), (31, unix)):
    os.dup2(sock.fileno(), number)
for number in (3, 4):
    os.dup2(number + 27, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
os.execv(sys.executable, [sys.executable, "-m", "ullm", "serve", *sys.argv[2:]])
"""


def test_systemd_is_told(serve: Serve, scripted_model: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)

        def listen() -> list[str]:
            try:
                while True:
                    heard.append(manager.recv(4096).decode())
            except BlockingIOError:
                return heard

        server = serve(
            "--model",
            str(scripted_model),
            *SCRIPTED,
            environ={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"},
        )
        eventually(lambda: any(message.startswith("READY=1\n") for message in listen()))
        beats = listen().count("WATCHDOG=1")
        eventually(lambda: listen().count("WATCHDOG=1") >= beats + 3)
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(server.worker().environ())
        assert not any(message.startswith("STOPPING") for message in listen())
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert any(message.startswith("STOPPING=1\n") for message in listen())


def test_it_serves_sockets_that_it_inherits(serve: Serve, scripted_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    own = ["--model", str(scripted_model), *SCRIPTED, "--standby-workers", "0"]
    server = serve(command=[sys.executable, "-c", ACTIVATED, str(path), *own])
    assert server.complete(max_tokens=3).status_code == 200
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://localhost/live").status_code == 200
    assert not {"LISTEN_PID", "LISTEN_FDS"} & set(server.worker().environ())
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert path.exists()  # it is systemd's


def test_it_serves_on_a_path(serve: Serve, scripted_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    own = f"{sys.executable} -m ullm serve --uds {path} --model {scripted_model} {' '.join(SCRIPTED)}"
    server = serve(command=["sh", "-c", f"exec {own} --standby-workers 0"], ready=r"^ready: (unix:\S+) model")
    assert server.url == f"unix:{path}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        body = {"prompt": [300], "max_tokens": 3, "ignore_eos": True}
        assert client.post("http://localhost/v1/completions", json=body).status_code == 200
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not path.exists()
