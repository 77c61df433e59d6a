"""Child processes take no module from a model's folder, though it is the working directory."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_contracts import PACKAGE
from ullm.system.interpreter import module_search_path, python_command, python_environment

PLANTED = ("json", "transformers", "pip", "torch", "safetensors", "ullm", "own_module")
ROOT = str(PACKAGE.parent)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model repository that is the working directory, and has files with the names of modules."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(66)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.process
@pytest.mark.parametrize("entries", [[], [""], ["HERE"], ["HERE", ""]], ids=str)
def test_nothing_in_the_working_directory_shadows_a_module(
    entries: list[str], hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it came into this process's search path: ``python -m``, a prompt, an empty entry."""
    ours = [entry for entry in sys.path if entry and entry != str(hostile)]
    monkeypatch.setattr(sys, "path", [entry.replace("HERE", str(hostile)) for entry in entries] + ours)
    code = "import json, ullm, importlib.util as u; print(u.find_spec('pip'), u.find_spec('torch').origin)"
    done = subprocess.run(
        python_command("-c", code), env=python_environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert str(hostile) not in done.stdout


@pytest.mark.process
def test_the_same_by_the_name_of_a_module(hostile: Path) -> None:
    """As pip and the conversion are started."""
    command = python_command("-m", "json", "--help")
    done = subprocess.run(command, env=python_environment(), capture_output=True, text=True, check=False)
    assert done.returncode != 66
    assert "json" in done.stdout + done.stderr


def test_modules_of_the_users_own_are_found_last(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert module_search_path()[-1] == str(hostile)


def test_a_checkout_of_ullm_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    assert module_search_path() == [ROOT, "/elsewhere"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not remove a folder that is in use")
def test_a_removed_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    assert module_search_path() == ["/elsewhere"]


def test_every_python_process_is_started_by_this_module() -> None:
    """Elsewhere, ``sys.executable`` is allowed with ``-I`` only, which ignores the environment, too."""
    elsewhere = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        isolated = {
            id(node.elts[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.List) and len(node.elts) > 1 and ast.unparse(node.elts[1]) == "'-I'"
        }
        elsewhere += [
            f"{path.relative_to(PACKAGE)}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and ast.unparse(node) == "sys.executable"
            and id(node) not in isolated
            and path.name != "interpreter.py"
        ]
    assert elsewhere == []
