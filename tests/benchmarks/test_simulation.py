"""The simulation of many replicas: nothing is lost in it, and a seed gives the same run again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.benchmarks.simulation.chats import SYSTEM_PROMPTS, make_chats
from tests.benchmarks.simulation.simulated_run import Scenario, run_scenario
from tests.benchmarks.simulation.simulation_report import SimulationReport, write_plot
from ullm.scheduling.routing import RoutingPolicy


def test_chats_have_as_many_turns_as_were_asked_for() -> None:
    chats = list(make_chats(1, 500, 10.0))
    assert sum(len(chat.turns) for chat in chats) == 500
    assert len({tuple(chat.system) for chat in chats}) <= SYSTEM_PROMPTS
    assert [chat.start for chat in chats] == sorted(chat.start for chat in chats)


@pytest.mark.parametrize(("policy", "front_ends"), [("prefix", 0), ("round-robin", 0), ("prefix", 3)])
def test_nothing_is_lost_and_a_seed_gives_the_same_run(
    policy: RoutingPolicy, front_ends: int, tmp_path: Path
) -> None:
    scenario = Scenario(2, 100, policy, faults=8, rate=5.0, front_ends=front_ends)
    first, second = run_scenario(scenario), run_scenario(scenario)
    assert first.failed == 0
    assert 4 <= first.lost + first.hung + first.cut <= 8
    assert bool(first.cut) == bool(front_ends)
    assert first.resumed > 0
    same = {"cpu_seconds": 0.0, "choice_seconds": 0.0}
    assert msgspec.structs.replace(first, **same) == msgspec.structs.replace(second, **same)
    assert f"| 2, {front_ends or 'none'}, 100, {policy} | 0 |" in SimulationReport([first]).markdown()
    pytest.importorskip("matplotlib")
    write_plot([first], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
