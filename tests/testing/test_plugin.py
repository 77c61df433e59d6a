"""The plugin in a project that is not ullm: the page's own suite, and what it costs where nobody uses it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from ullm.faults import FRAME_ACTIONS, POINTS, FaultPlan
from ullm.faults.plan import Fault
from ullm.testing import __all__ as testing_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "fault-injection.md").read_text("utf-8")
INSTALLED = any(
    entry.value == "ullm.testing.plugin" for entry in importlib.metadata.entry_points(group="pytest11")
)
PLUGIN = () if INSTALLED else ("-p", "ullm.testing.plugin")
"""An environment that was installed before there was the plugin does not know it."""

UNUSED = ("-p", "no:schemathesis", "-p", "no:anyio", "-p", "no:xdist")
"""Other plugins, which take seconds to import."""


def run(folder: Path, *options: str, environ: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *UNUSED, *PLUGIN, *options]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, env={**os.environ, **environ}
    )


def block(language: str, number: int = 0, page: str = PAGE) -> str:
    return str(re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)[number])


@pytest.mark.process
def test_the_pages_suite_passes(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text(block("ini"), "utf-8")
    (tmp_path / "test_resilience.py").write_text(block("python"), "utf-8")
    done = run(tmp_path, "-W", "error")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b7 passed", done.stdout)


@pytest.mark.process
def test_the_program_with_points_of_its_own_runs() -> None:
    done = subprocess.run([sys.executable, "-c", block("python", 1)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "retry b" in done.stdout
    assert "ledger.write:raise at hit 2 (request b): raised, there again after" in done.stdout


@pytest.mark.process
def test_the_property_test_of_its_page_passes(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "property-tests.md").read_text("utf-8")
    (tmp_path / "test_property.py").write_text(block("python", page=page), "utf-8")
    done = run(tmp_path, "-p", "no:trio")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.process
def test_a_suite_that_loses_something_fails(tmp_path: Path) -> None:
    """The page's suite would notice: here the fault takes the whole engine with it."""
    suite = block("python").replace("worker.step:crash@nth=7", "worker.step:crash@nth=7,times=always", 1)
    (tmp_path / "pytest.ini").write_text(block("ini"), "utf-8")
    (tmp_path / "test_resilience.py").write_text(suite, "utf-8")
    done = run(tmp_path, "-k", "test_nothing_is_lost")
    assert done.returncode == 1
    assert "1 failed, 4 passed" in done.stdout


@pytest.mark.process
def test_what_is_left_fails_the_test(tmp_path: Path) -> None:
    (tmp_path / "test_leak.py").write_text(
        "import subprocess, tempfile\n"
        "def test_leaves(ullm_no_leaks):\n"
        "    tempfile.mkdtemp()\n"
        "def test_leaves_nothing(ullm_no_leaks):\n"
        "    subprocess.run(['true'])\n",
        "utf-8",
    )
    done = run(tmp_path)
    assert "2 passed, 1 error" in done.stdout
    assert "left behind: temporary file" in done.stdout


@pytest.mark.process
def test_a_project_that_does_not_use_it_pays_nothing(tmp_path: Path) -> None:
    heavy = ("trio", "torch", "tokenizers", "psutil", "quart", "ullm.engine", "ullm.actors")
    (tmp_path / "test_light.py").write_text(
        f"import sys\ndef test_light():\n    assert 'ullm.testing.plugin' in sys.modules\n"
        f"    assert [m for m in {heavy} if m in sys.modules] == []\n",
        "utf-8",
    )
    others = ("-p", "no:trio", "-p", "no:anyio", "-p", "no:hypothesispytest", "-p", "no:schemathesis")
    done = run(tmp_path, *others, "-p", "no:xdist")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_plan_on_the_page_can_be_read() -> None:
    plans = re.findall(
        r"[\"'`]((?:worker|frame|scheduler|router|tokenizer|engine)\.\w+:[^\"'`]+)[\"'`]", PAGE
    )
    assert len(plans) >= 9
    for plan in plans:
        assert FaultPlan.parse(plan).faults


def test_the_page_names_everything() -> None:
    words = set(re.findall(r"[`:]([\w.]+)", PAGE))
    assert set(POINTS) <= words
    assert {action for actions in POINTS.values() for action in actions} <= words
    assert set(Fault.__struct_fields__) - {"point", "action"} <= words
    assert set(FRAME_ACTIONS) <= words


def test_every_name_can_be_imported() -> None:
    import ullm.testing

    for name in testing_names:
        assert getattr(ullm.testing, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ullm.testing.nonsense
