"""What a start costs: the variants, the verdict, and starts of a scripted server."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import trio

from tests.benchmarks.shared_options import parse_numbers
from tests.benchmarks.startup import (
    ServerStart,
    StartupPlan,
    StartupReport,
    StartVariant,
    run_startup,
    variants,
)
from ullm.errors import UsageError
from ullm.testing import write_scripted_model

SCRIPTED = ("--load-format", "dummy", "--runner", "ullm.testing:ScriptedRunner")


def test_variants_of_a_start() -> None:
    assert variants([512, 1024], []) == [
        StartVariant("context 512", ("--context-len", "512")),
        StartVariant("context 1024", ("--context-len", "1024")),
    ]
    both = ("--context-len", "512", "--num-blocks", "64")
    assert variants([512], [64]) == [StartVariant("context 512, 64 blocks", both)]
    assert parse_numbers([], "--blocks") == []
    with pytest.raises(UsageError, match="--blocks 5,x: expected numbers"):
        parse_numbers(["5", "x"], "--blocks")


def test_a_start_that_costs_more() -> None:
    def startup(second: float) -> StartupReport:
        cheap = [ServerStart(1, 0.5, 2, 1, 3, 1.5, 70), ServerStart(1, 0.5, 2, 1, 3, 2.0, 70)]
        other = [ServerStart(1, 0.5, 2, 1, 3, second, 70)]
        machine = {"cores": 2, "processor": "p", "platform": "l"}
        return StartupReport("2026", machine, ["-m", "ullm"], 2, 0.1, {"a": cheap, "b": other})

    assert startup(1.6).good
    assert not startup(1.7).good
    assert "| a | 1.00 (0.50) | 2.00 (1.00) | 3.00 (1.50) | 70.0 |" in startup(1.6).markdown()


@pytest.mark.slow
@pytest.mark.process
async def test_starts_of_a_scripted_server(tmp_path: Path) -> None:
    model = write_scripted_model(tmp_path / "model")
    said: list[str] = []
    chosen = variants([512, 4096], [])
    with trio.fail_after(60):
        plan = StartupPlan(str(model), SCRIPTED, chosen, 2, 0.5, tmp_path)
        found = await run_startup(plan, said.append)
    assert [line.split(":")[1] for line in said] == [
        *(" context 512", " context 4096", " context 4096", " context 512"),
    ]
    for start in itertools.chain.from_iterable(found.starts.values()):
        assert 0 < start.live <= start.ready < start.first
        assert 0 < start.live_cpu <= start.ready_cpu <= start.first_cpu
        assert start.pss > 10
    assert found.good, found.json()
