"""What systemd is told: that the server is ready, that it stops, and that it lives."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from ullm.cli.systemd import ServiceManager
from ullm.engine import Engine

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd is Linux's")


class FakeEngine:
    """Waits for a request to stop."""

    def __init__(self) -> None:
        self.stop = trio.Event()

    async def wait_stop_requested(self) -> None:
        await self.stop.wait()


class FakeSystemd:
    """The socket that takes messages."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        messages = []
        try:
            while True:
                messages.append(self._socket.recv(4096).decode())
        except BlockingIOError:
            return messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["a path", "an abstract name"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "a path" else f"@ullm-test-{os.getpid()}"


@pytest.fixture
def systemd(address: str) -> Iterator[FakeSystemd]:
    systemd = FakeSystemd(address)
    yield systemd
    systemd.close()


async def test_ready_alive_and_stopping(
    address: str, systemd: FakeSystemd, autojump_clock: trio.testing.MockClock
) -> None:
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "10000000", "PATH": "/bin"}
    manager = ServiceManager.from_environment(environ)
    assert environ == {"PATH": "/bin"}  # children do not speak for the server
    engine: Any = FakeEngine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.accompany, cast(Engine, engine))
        await trio.sleep(1)
        manager.ready("serving m")
        assert systemd.heard() == ["WATCHDOG=1", "READY=1\nSTATUS=serving m"]
        await trio.sleep(20)
        assert systemd.heard() == ["WATCHDOG=1"] * 4  # twice as often as necessary
        engine.stop.set()
        await trio.sleep(5)
        assert systemd.heard() == ["STOPPING=1\nSTATUS=stopping", "WATCHDOG=1"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "watchdog", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}]
)
async def test_a_watchdog_of_nobody_gets_nothing(
    address: str, systemd: FakeSystemd, watchdog: dict[str, str], autojump_clock: trio.testing.MockClock
) -> None:
    manager = ServiceManager.from_environment({"NOTIFY_SOCKET": address, **watchdog})
    with trio.move_on_after(60):
        await manager.accompany(cast(Engine, FakeEngine()))
    assert systemd.heard() == []


def test_without_systemd_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager.from_environment({}).ready("serving m")
    assert not caplog.records


def test_a_socket_that_is_gone_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = ServiceManager(str(tmp_path / "gone"))
    manager.ready("serving m")
    manager.ready("serving m")
    (record,) = caplog.records
    assert "systemd" in record.getMessage()
