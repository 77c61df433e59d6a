"""docs/supervision.md is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ullm.supervision

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "supervision.md").read_text(encoding="utf-8")


@pytest.mark.process
def test_the_example_prints_what_the_page_says() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == printed


def test_twenty_lines_are_twenty_lines() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in program.splitlines() if line and "import" not in line]) <= 20


def test_every_public_name_is_in_the_page() -> None:
    missing = [name for name in ullm.supervision.__all__ if name not in PAGE]
    assert missing == []


def test_it_stands_alone() -> None:
    """Whoever embeds it gets nothing of the engine."""
    allowed = {"trio", "ullm.supervision.actor", "ullm.errors", "ullm.logs", *sys.stdlib_module_names}
    files = [*(ROOT / "ullm" / "supervision").glob("*.py"), ROOT / "ullm" / "actors" / "base.py"]
    foreign = {
        name
        for file in files
        for name in imports(ast.parse(file.read_text(encoding="utf-8")))
        if name not in allowed and not name.startswith(("ullm.supervision", "collections."))
    }
    assert foreign == set()


def test_the_pure_parts_know_neither_trio_nor_clocks() -> None:
    for module in ("policy", "shutdown"):
        tree = ast.parse((ROOT / "ullm" / "supervision" / f"{module}.py").read_text(encoding="utf-8"))
        assert imports(tree).isdisjoint({"trio", "time", "ullm.logs"})


def imports(tree: ast.AST) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names
