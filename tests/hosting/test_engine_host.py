"""What a host does at each request to stop: the engine and the watchdog always hear of it together."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ullm.config import EngineConfig
from ullm.engine import Engine
from ullm.hosting import engine_host
from ullm.hosting.engine_host import EngineHost
from ullm.protocol import stop_budget
from ullm.protocol.exit_codes import EXIT_ABANDONED


class RecordingEngine:
    """Notes which of its methods are called."""

    config = EngineConfig(shutdown_timeout=25.0)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def request_shutdown(self, timeout: float | None = None, *, by: str = "shutdown()") -> None:
        self.calls.append(("request_shutdown", timeout, by))

    def kill(self, number: int) -> None:
        self.calls.append(("kill", number))


@pytest.fixture
def host() -> EngineHost:
    host = EngineHost(cast(Engine, RecordingEngine()))
    assert host.watchdog.exit_code == EXIT_ABANDONED
    armed: list[float] = []
    watchdog = SimpleNamespace(arm=armed.append, armed=armed, exit_code=EXIT_ABANDONED, cleanup=bool)
    host.watchdog = cast(Any, watchdog)
    return host


@pytest.mark.parametrize(("timeout", "seconds"), [(None, 30.0), (7.0, 12.0), (0.0, 5.0)])
def test_each_request_arms_the_watchdog(host: Any, timeout: float | None, seconds: float) -> None:
    host.request_stop(timeout, by="SIGTERM")
    assert host.watchdog.armed == [seconds]
    assert host.engine.calls == [("request_shutdown", timeout, "SIGTERM")]


def test_signals_arm_the_watchdog_sooner_each_time(host: Any) -> None:
    for count in (1, 2, 3):
        host._arm_watchdog(signal.SIGTERM, count)
    assert host.watchdog.armed == [30.0, 5.0, stop_budget.FORCED_EXIT]
    assert host.watchdog.exit_code == 128 + signal.SIGTERM


def test_the_third_signal_kills_cleans_up_and_leaves_whatever_goes_wrong(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cleanup() -> None:
        host.engine.calls.append(("cleanup",))
        raise OSError("no such file")

    host.watchdog.cleanup = cleanup
    monkeypatch.setattr(engine_host, "leave_now", lambda number: host.engine.calls.append(("leave", number)))
    with pytest.raises(OSError, match="no such file"):
        host._leave(signal.SIGTERM)
    assert host.engine.calls == [("kill", signal.SIGTERM), ("cleanup",), ("leave", signal.SIGTERM)]
