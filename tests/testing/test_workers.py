"""Several workers: which tests stay together, and who runs alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.workers import group, turn

ROOT = Path(__file__).parents[2]
TAKE_TURN = """
import sys
from pathlib import Path
from tests.support.workers import turn
with turn(Path(sys.argv[1]), alone=sys.argv[2] == "alone"):
    print("runs", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("nodeid", "name"),
    [
        ("tests/e2e/test_parity.py::test_x[a@b]", "real_model"),
        ("tests/e2e/test_openai.py::test_x", "real_model"),
        ("tests/e2e/test_stopping.py::test_x", "tests/e2e/test_stopping.py"),
    ],
)
def test_what_shares_a_server_stays_together(nodeid: str, name: str) -> None:
    assert group(nodeid) == name


class XdistWorker:
    """Another worker, in a test."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TURN, str(folder), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def wait_runs(self) -> None:
        """Wait until it has its turn."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "runs\n"

    def end(self) -> None:
        """Let its test end."""
        self.process.communicate("\n")


@pytest.fixture
def _among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")


@pytest.mark.process
@pytest.mark.usefixtures("_among_workers")
def test_ordinary_tests_run_beside_each_other(tmp_path: Path) -> None:
    with turn(tmp_path, alone=False):
        other = XdistWorker(tmp_path, "beside")
        other.wait_runs()
        other.end()


@pytest.mark.process
@pytest.mark.usefixtures("_among_workers")
def test_one_that_measures_seconds_waits_for_all_and_all_for_it(tmp_path: Path) -> None:
    first, second = XdistWorker(tmp_path, "beside"), XdistWorker(tmp_path, "beside")
    first.wait_runs()
    second.wait_runs()
    alone = XdistWorker(tmp_path, "alone")
    first.end()
    second.end()
    alone.wait_runs()
    late = XdistWorker(tmp_path, "beside")
    with pytest.raises(subprocess.TimeoutExpired):
        late.process.wait(0.3)
    alone.end()
    late.wait_runs()
    late.end()
