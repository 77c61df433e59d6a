"""Random faults against live servers: nothing is lost, nothing grows, nothing is left."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ullm.chaos.chaos_plan import ChaosPlan, all_kinds
from ullm.chaos.chaos_report import ChaosReport
from ullm.chaos.chaos_run import run_chaos

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals"),
]

BUSY = 30.0
"""Seconds of silence that are no violation here: other tests use the same cores."""


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: the admin listener's socket needs a short path.
    with tempfile.TemporaryDirectory(prefix="ullm-chaos-") as name:
        yield Path(name)


def check(report: ChaosReport, folder: Path) -> None:
    broken = [f"{verdict.what}: {verdict.detail}" for verdict in report.verdicts if not verdict.good]
    log = (folder / "server.log").read_text("utf-8", "replace")
    said = [*broken, *report.violations, *(str(f) for f in report.faults), log[-20_000:]]
    assert broken == [], "\n".join(said)


@pytest.mark.parametrize(
    ("seed", "faults"),
    [
        (1, 12),
        pytest.param(1, 40, marks=pytest.mark.slow),
        *(pytest.param(seed, 40, marks=pytest.mark.long) for seed in range(2, 10)),
    ],
)
async def test_a_server_under_faults_loses_nothing(folder: Path, seed: int, faults: int) -> None:
    plan = ChaosPlan(
        "scripted", seed=seed, faults=faults, seconds=90, pause=0.3, max_tokens=(20, 80), max_gap=BUSY
    )
    report = await run_chaos(plan, folder)
    check(report, folder)
    assert len(report.faults) == faults
    offered, known = ({kind.name for kind in kinds} for kinds in (report.kinds, all_kinds()))
    known = {name for name in known if not name.startswith("part.")}  # of a launcher
    assert offered == known, "the server offers less than it used to"


@pytest.mark.slow
async def test_one_seed_is_one_run_and_a_report_is_run_again(folder: Path) -> None:
    """Nothing that depends on the time may decide what is done, asked or found."""
    plan = ChaosPlan("scripted", seed=6, faults=8, seconds=60, pause=0.1, max_tokens=(20, 40), max_gap=BUSY)
    reports: list[ChaosReport] = []
    for name in "ab":
        (folder / name).mkdir()
        begun = reports[0].plan[:2] if reports else []  # the seed draws what follows
        reports.append(await run_chaos(plan, folder / name, replay=begun))
        check(reports[-1], folder / name)
    first, second = reports
    assert second.repeatable == first.repeatable
    assert len(first.plan) > 4
    # At once means at once: within a moment, who is first depends on the time.
    assert sorted(fault.kind for fault in second.faults) == sorted(fault.kind for fault in first.faults)


LAYOUTS = {
    "tp": ("tiny", "--tp-size", "2"),
    "pp": ("tiny", "--pp-size", "2"),
    "replicas": ("scripted", "--replicas", "2"),
    "front-ends": ("scripted", "--api-server-count", "2"),
}
"""More than one of something: the model, and the options."""


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "front-ends"])
async def test_more_than_one_of_something_under_faults_loses_nothing(folder: Path, layout: str) -> None:
    model, *options = LAYOUTS[layout]
    plan = ChaosPlan(
        model, tuple(options), seed=4, faults=12, seconds=150, pause=0.3, max_tokens=(20, 80), max_gap=BUSY
    )
    check(await run_chaos(plan, folder), folder)


@pytest.mark.slow
async def test_engines_and_front_ends_are_killed_and_nothing_is_lost(folder: Path) -> None:
    """But for the connections of the front ends that are killed."""
    model, *options = LAYOUTS["front-ends"]
    plan = ChaosPlan(
        model,
        tuple(options),
        seed=16,
        faults=12,
        seconds=150,
        pause=0.3,
        max_tokens=(20, 80),
        max_gap=BUSY,
        only=("part", "worker", "client"),
    )
    report = await run_chaos(plan, folder)
    check(report, folder)
    injected = {kind.name for kind in report.kinds if kind.count}
    assert injected > {"part.engine-kill", "part.front-end-kill"}, "another seed is needed"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_hundreds_of_faults_of_more_than_one(folder: Path, layout: str) -> None:
    model, *options = LAYOUTS[layout]
    plan = ChaosPlan(model, tuple(options), seed=5, faults=300, seconds=800, max_gap=BUSY)
    check(await run_chaos(plan, folder), folder)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["scripted", "tiny"])
async def test_hundreds_of_faults(folder: Path, model: str) -> None:
    plan = ChaosPlan(model, seed=3, faults=300, seconds=540, max_gap=BUSY)
    check(await run_chaos(plan, folder), folder)
