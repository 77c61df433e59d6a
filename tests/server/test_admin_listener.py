"""The admin listener: its addresses, its socket's file, and the clients that it serves."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio
from fake_engine import FakeEngine

from ullm.config import ServerConfig
from ullm.errors import ConfigError
from ullm.server import file_remover, open_admin_socket, serve_admin, urls

unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no unix sockets here")


@asynccontextmanager
async def listening(engine: FakeEngine, where: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an admin listener; it has no key, and needs none."""
    config = ServerConfig(api_key="api", admin_key="admin")
    with open_admin_socket(where) as sock:
        async with trio.open_nursery() as nursery:

            async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
                await serve_admin(engine, config, sock=sock, task_status=task_status)

            (url,) = await nursery.start(run)
            path = url.removeprefix("unix:") if url.startswith("unix:") else None
            transport = httpx.AsyncHTTPTransport(uds=path)
            base = "http://localhost" if path else url
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                yield client
            nursery.cancel_scope.cancel()


async def check_endpoints(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.post("/sleep", json={"level": 2})).json()["level"] == 2
    assert (await client.get("/is_sleeping")).json()["is_sleeping"] is True
    assert (await client.post("/wake_up")).json()["state"] == "awake"
    assert (await client.get("/admin/tree")).json()["children"][0]["name"] == "http"
    assert (await client.get("/live")).status_code == 200
    assert "ullm_engine_state" in (await client.get("/metrics")).text
    assert (await client.post("/admin/shutdown", json={"timeout": 3})).status_code == 200
    assert engine.asked[-1] == ("shutdown", 3, "admin")
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 404
    bad = await client.post("/sleep", json={"level": 9})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "level")


@unix
async def test_a_unix_socket(engine: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with listening(engine, f"unix:{path}") as client:
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        await check_endpoints(client, engine)
    assert not path.exists()


async def test_a_loopback_port(engine: FakeEngine) -> None:
    async with listening(engine, "127.0.0.1:0") as client:
        await check_endpoints(client, engine)


async def test_no_page_of_a_browser_is_answered(engine: FakeEngine) -> None:
    """Scripts of a page may send requests to loopback, directly or by a name that resolves to it."""
    async with listening(engine, "127.0.0.1:0") as client:
        for headers in (
            {"Origin": "https://a.example"},
            {"Origin": "null"},
            {"Host": "a.example"},
            {"Host": "a.example:8000"},
            {"Host": "10.0.0.1"},
        ):
            refused = await client.post("/admin/shutdown", headers=headers)
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "foreign_origin"
        for host in ("localhost", "localhost:9", "127.0.0.1:9", "[::1]:9", "127.9.9.9"):
            assert (await client.get("/admin/tree", headers={"Host": host})).status_code == 200
    assert engine.asked == []


@unix
def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    with open_admin_socket(f"unix:{path}"):
        assert path.exists()
    assert not path.exists()


@unix
def test_a_living_server_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with open_admin_socket(f"unix:{path}"):
        inode = path.stat().st_ino
        with pytest.raises(ConfigError, match=r"--admin-listen.*another server") as caught:
            open_admin_socket(f"unix:{path}").__enter__()
        assert "\n" not in str(caught.value)
        assert path.stat().st_ino == inode
    assert not path.exists()


@unix
def test_a_socket_that_took_our_place_stays(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    other = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as successor:
        successor.bind(str(other))
        with open_admin_socket(f"unix:{path}"):
            os.replace(other, path)
        assert path.exists()


@unix
def test_who_leaves_by_force_removes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "admin"
    with open_admin_socket(f"unix:{path}") as sock:
        remove = file_remover(sock)
        remove()
        assert not path.exists()
        path.write_text("of another server")
        remove()
        assert path.exists()
    with open_admin_socket("127.0.0.1:0") as sock:
        file_remover(sock)()


@unix
@pytest.mark.parametrize("name", ["a file", "missing/admin.sock", "x" * 120])
def test_paths_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").write_text("precious")
    with pytest.raises(ConfigError, match="--admin-listen") as caught:
        open_admin_socket(f"unix:{tmp_path / name}").__enter__()
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a file").read_text() == "precious"


@pytest.mark.parametrize(
    "where", ["0.0.0.0:0", "192.0.2.1:80", "8000", ":8000", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999"]
)
def test_addresses_that_cannot_be(where: str) -> None:
    with pytest.raises(ConfigError, match="--admin-listen") as caught:
        open_admin_socket(where).__enter__()
    assert "\n" not in str(caught.value)


def test_a_taken_port() -> None:
    with open_admin_socket("127.0.0.1:0") as first:
        where = urls([first])[0].removeprefix("http://")
        with pytest.raises(ConfigError, match=where):
            open_admin_socket(where).__enter__()
