"""How long clients wait: measured once, of a server of a scripted model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio

from tests.benchmarks.pauses import EVENTS, Nap, PausesReport, run_pauses
from ullm.testing import write_scripted_model


def test_a_report_of_pauses() -> None:
    nap = Nap(0.1, 0.2, 0.3, 0.04, 800.0, 80.0)
    machine = {"cores": 2, "processor": "p", "platform": "l"}
    found = PausesReport(
        "2026", machine, ["python", "-m"], 6, {"worker SIGKILL": [0.1, 0.3, 0.2]}, {1: [nap]}
    )
    text = found.markdown()
    assert "| worker SIGKILL | longest silence in a stream | 0.20 (0.30) |" in text
    assert "| 1 | 0.10 (0.10) | 0.20 (0.20) | 0.30 (0.30) | 0.04 (0.04) | 800 | 80 |" in text


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
async def test_pauses_of_a_scripted_server(tmp_path: Path) -> None:
    model = write_scripted_model(tmp_path / "model", step_seconds=0.002)
    command = [sys.executable, "-m", "ullm", "serve", "--port", "{port}", "--model", str(model)]
    command += ["--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner"]
    said: list[str] = []
    with trio.fail_after(240):
        found = await run_pauses(command, 3, 1, 0.0, said.append)
    assert found.pauses.keys() == EVENTS.keys()
    assert all(len(seconds) == 1 for seconds in found.pauses.values())
    undisturbed = found.pauses["undisturbed"][0]
    assert undisturbed < found.pauses["worker SIGSTOP"][0]  # a step timeout
    assert undisturbed < found.pauses["worker SIGKILL, no standby worker"][0]  # a start
    assert list(found.naps) == [0, 1, 2, 3]
    (pause,), (deepest,) = found.naps[0], found.naps[3]
    assert pause.woken < deepest.woken  # a start
    assert deepest.awake < deepest.first
    assert deepest.memory_asleep < deepest.memory_awake
