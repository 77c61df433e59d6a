"""Sockets that are bound on a path, and those that systemd passes on."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from fake_engine import FakeEngine

from ullm.config import ServerConfig
from ullm.errors import ConfigError
from ullm.hosting.front_end_listener import open_front_end_socket
from ullm.server import open_sockets, serve_http, warn_if_open

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Python has no unix sockets there")

INHERITING = """
import os, socket, sys
from ullm.errors import ConfigError
from ullm.server import inherited_sockets

{make}
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="{count}", LISTEN_FDNAMES="a:b")
os.environ.update({more})
try:
    found = inherited_sockets(os.environ)
except ConfigError as error:
    sys.exit(str(error))
print([sock.getsockname() for sock in found], [os.get_inheritable(sock.fileno()) for sock in found])
print([name for name in os.environ if name.startswith("LISTEN_")])
"""
LISTENING = """
for number in (3, 4):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"socket{number}")
    sock.listen()
    os.dup2(sock.detach(), number)
"""


def inherit(folder: Path, make: str = LISTENING, count: str = "2", more: str = "{}") -> tuple[int, str]:
    """Run a program that inherits sockets; return its exit status and what it has said."""
    done = subprocess.run(
        [sys.executable, "-c", INHERITING.format(make=make, count=count, more=more)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).strip()


@pytest.mark.process
async def test_the_api_on_a_path(engine: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    config = ServerConfig(uds=str(path))
    before = os.umask(0o007)
    try:
        with open_sockets(config) as sockets:
            warn_if_open(config, sockets[0])
            assert stat.S_IMODE(path.stat().st_mode) == 0o770  # as the umask has it
            async with trio.open_nursery() as nursery:

                async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
                    await serve_http(engine, config, sockets=sockets, task_status=task_status)

                assert await nursery.start(run) == [f"unix:{path}"]
                transport = httpx.AsyncHTTPTransport(uds=str(path))
                async with httpx.AsyncClient(transport=transport) as client:
                    # no browser reaches it, so pages need not be kept out
                    answer = await client.get("http://any.example/v1/models", headers={"Origin": "https://a"})
                assert answer.status_code == 200
                nursery.cancel_scope.cancel()
    finally:
        os.umask(before)
    assert not path.exists()


@pytest.mark.process
async def test_who_keeps_answers_believes_the_same_user_only(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the routes of stored answers, and no others; whoever is another user is hung up on."""
    where = f"unix:{tmp_path}/answers"
    config = ServerConfig(connect="unix:/nowhere", answers_listen=where)
    with open_front_end_socket(where) as sock:
        async with trio.open_nursery() as nursery:
            engine.nursery = nursery
            await nursery.start(partial(serve_http, engine, config, sockets=[sock]))
            transport = httpx.AsyncHTTPTransport(uds=f"{tmp_path}/answers")
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                mine, theirs = {"X-Ullm-Owner": "mine"}, {"X-Ullm-Owner": "theirs"}
                made = await client.post("/v1/responses", json={"input": "Hello"}, headers=mine)
                assert made.status_code == 200
                place = f"/v1/responses/{made.json()['id']}"
                assert (await client.get(place, headers=mine)).status_code == 200
                assert (await client.get(place, headers=theirs)).status_code == 404
                assert (await client.get("/v1/models")).status_code == 404
            monkeypatch.setattr("ullm.server.http.listener.foreign_user", lambda sock: 4711)
            stream = await trio.open_unix_socket(f"{tmp_path}/answers")
            async with stream:
                assert await stream.receive_some() == b""
            nursery.cancel_scope.cancel()


def test_a_path_that_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    config = ServerConfig(uds=str(path))
    with open_sockets(config):
        with pytest.raises(ConfigError, match=r"--uds .*another server listens there"), open_sockets(config):
            pass
        assert path.exists()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with open_sockets(config):
        assert path.exists()
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"--uds .*not a socket"), open_sockets(config):
        pass
    assert path.read_text() == "mine"
    with (
        pytest.raises(ConfigError, match=r"--uds .*No such file"),
        open_sockets(ServerConfig(uds="/no/where")),
    ):
        pass


def test_there_is_one_spelling() -> None:
    with pytest.raises(ConfigError, match="--host unix:/run/x: use --uds /run/x"):
        ServerConfig(host="unix:/run/x")
    others: list[dict[str, Any]] = [{"host": "0.0.0.0"}, {"port": 9000}]
    for other in others:
        with pytest.raises(ConfigError, match="--uds /run/x takes the place of --host and --port"):
            ServerConfig(uds="/run/x", **other)
    with pytest.raises(ConfigError, match="--uds is empty"):
        ServerConfig(uds="")


@pytest.mark.process
def test_sockets_are_inherited(tmp_path: Path) -> None:
    assert inherit(tmp_path) == (0, "['socket3', 'socket4'] [False, False]\n[]")
    assert inherit(tmp_path, make="", count="0") == (0, "[] []\n[]")


@pytest.mark.process
def test_sockets_of_another_process_are_left_alone(tmp_path: Path) -> None:
    assert inherit(tmp_path, more='{"LISTEN_PID": "1"}') == (0, "[] []\n[]")


@pytest.mark.process
@pytest.mark.parametrize(
    ("make", "said"),
    [
        ("os.close(3) if os.path.exists('/proc/self/fd/3') else None", "descriptor 3: Bad file descriptor"),
        ("os.dup2(os.open('/dev/null', 0), 3)", "descriptor 3: Socket operation on non-socket"),
        ("os.dup2(socket.socket(type=socket.SOCK_DGRAM).detach(), 3)", "descriptor 3 is no stream socket"),
        ("os.dup2(socket.socket().detach(), 3)", "descriptor 3 is no stream socket that listens"),
    ],
)
def test_what_is_inherited_must_listen(tmp_path: Path, make: str, said: str) -> None:
    status, output = inherit(tmp_path, make=make, count="1")
    assert status == 1
    assert said in output
    assert len(output.splitlines()) == 1
