"""The program of events, against a server of a scripted model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.events import (
    START_UP,
    EventCandidate,
    EventOutcome,
    as_table,
    parse_candidate,
    run_event,
    run_start_up,
)
from ullm.errors import UsageError
from ullm.testing import write_scripted_model

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> EventCandidate:
    model = write_scripted_model(tmp_path_factory.mktemp("scripted"), step_seconds=0.002)
    command = [sys.executable, "-m", "ullm", "serve", "--port", "{port}", "--model", str(model)]
    command += ["--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner"]
    return EventCandidate("ullm", command, ["--shutdown-timeout", "{seconds}"])


EXPECTED: dict[str, dict[str, Any]] = {
    "undisturbed": {"streams": {"length": 4}, "error": None},
    "SIGTERM, 30 s to drain": {
        "probes": {"/live": "200", "/ready": "503", "/health": "503"},
        "streams": {"length": 4},
        "exit": 0,
        "processes left 1 s later": 0,
    },
    "SIGTERM, 4 s to drain": {"streams": {"abort": 4}, "exit": 0, "processes left 1 s later": 0},
    "second SIGTERM after 0.5 s": {"streams": {"abort": 4}, "exit": 0, "processes left 1 s later": 0},
    "worker SIGKILL": {"streams": {"length": 4}, "server": "runs", "late request": "served (length)"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
async def test_what_is_seen_at_an_event(candidate: EventCandidate, name: str) -> None:
    found = await run_event(candidate, name, 4, settle=0.0)
    assert {key: found.values[key] for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.slow
async def test_a_start_that_is_stopped(candidate: EventCandidate) -> None:
    found = await run_start_up(candidate, 0.2)
    assert found.event == START_UP
    assert found.values["processes left 1 s later"] == 0


def test_a_server_is_named_with_its_command(tmp_path: Path) -> None:
    text = "vllm=vllm serve {port} --x 'a b' -- --shutdown-timeout {seconds}"
    assert parse_candidate(text) == EventCandidate(
        "vllm", shlex.split("vllm serve {port} --x 'a b'"), ["--shutdown-timeout", "{seconds}"]
    )
    with pytest.raises(UsageError, match="NAME=COMMAND"):
        parse_candidate("vllm serve")


def test_outcomes_are_put_side_by_side() -> None:
    outcomes = {name: [EventOutcome(event, {"exit": name}) for event in "ab"] for name in ("x", "y")}
    table = as_table(outcomes)
    assert [column.header for column in table.columns] == ["event", "x", "y"]
    assert [list(column.cells) for column in table.columns] == [["a", "b"], ["exit: x"] * 2, ["exit: y"] * 2]
