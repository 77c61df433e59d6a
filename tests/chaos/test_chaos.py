"""Random faults against live servers: nothing is lost, nothing grows, nothing is left."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ullm.chaos.report import ChaosReport
from ullm.chaos.run import Plan, all_kinds, run_chaos
from ullm.cli.chaos import with_model

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: the admin listener's socket needs a short path.
    with tempfile.TemporaryDirectory(prefix="ullm-chaos-") as name:
        yield Path(name)


def check(report: ChaosReport, folder: Path) -> None:
    broken = [f"{verdict.what}: {verdict.detail}" for verdict in report.verdicts if not verdict.good]
    log = (folder / "server.log").read_text("utf-8", "replace")
    assert broken == [], "\n".join([*report.violations, *(str(f) for f in report.faults), log[-20_000:]])


@pytest.mark.parametrize(
    ("seed", "faults"),
    [(1, 12), *(pytest.param(seed, 40, marks=pytest.mark.slow) for seed in (1, 2))],
)
async def test_a_server_under_faults_loses_nothing(folder: Path, seed: int, faults: int) -> None:
    plan = Plan("scripted", seed=seed, faults=faults, seconds=90, pause=0.3, max_tokens=(20, 80))
    report = await run_chaos(with_model(plan, folder / "model"), folder)
    check(report, folder)
    assert len(report.faults) == faults
    offered, known = ({kind.name for kind in kinds} for kinds in (report.kinds, all_kinds()))
    assert offered == known, "the server offers less than it used to"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["scripted", "tiny"])
async def test_hundreds_of_faults(folder: Path, model: str) -> None:
    plan = Plan(model, seed=3, faults=300, seconds=540)
    check(await run_chaos(with_model(plan, folder / "model"), folder), folder)
