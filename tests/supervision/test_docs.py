"""docs/explanation/supervision.md is true, and the library stands alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ullm.supervision

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ullm" / "supervision"
PAGE = (ROOT / "docs" / "explanation" / "supervision.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```", PAGE, re.DOTALL)

BLOCK = textwrap.dedent(
    """
    import sys

    ALLOWED = {"trio", "attr", "attrs", "idna", "outcome", "sniffio", "sortedcontainers", "cffi"}

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            top = name.partition(".")[0]
            own = name in ("ullm", "ullm.release") or name.startswith("ullm.supervision")
            of_ullm = name.startswith("ullm.") and not own
            if of_ullm or (top != "ullm" and top not in ALLOWED and top not in sys.stdlib_module_names):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocked())
    """
)
"""Imports trio, what trio itself needs, and the standard library; anything else fails."""


def run(program: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_its_output() -> None:
    assert len(EXAMPLES) == PAGE.count("```python\n") == 3


@pytest.mark.process
@pytest.mark.parametrize(("program", "printed"), EXAMPLES, ids=["twenty lines", "station", "batch"])
def test_the_examples_print_what_the_page_says_with_trio_alone(program: str, printed: str) -> None:
    assert run(BLOCK + program, "-W", "error") == printed


def test_twenty_lines_are_twenty_lines() -> None:
    program, _ = EXAMPLES[0]
    assert len([line for line in program.splitlines() if line and "import" not in line]) <= 20


def test_every_public_name_is_in_the_page() -> None:
    missing = [name for name in ullm.supervision.__all__ if name not in PAGE]
    assert missing == []


@pytest.mark.process
def test_importing_it_loads_nothing_else_of_ullm() -> None:
    listing = "import ullm.supervision; print(*sorted(name for name in sys.modules if name[:4] == 'ullm'))"
    loaded = run(BLOCK + listing).split()
    modules = {f"ullm.supervision.{path.stem}" for path in PACKAGE.glob("*.py")}
    expected = {"ullm", "ullm.release", "ullm.supervision"} | modules - {"ullm.supervision.__init__"}
    assert set(loaded) == expected


@pytest.mark.process
def test_the_block_blocks() -> None:
    """So that the tests above can fail."""
    for name in ("ullm.errors", "ullm.logs", "structlog", "msgspec"):
        program = f"{BLOCK}\ntry:\n    import {name}\nexcept ImportError as error:\n    print(error)"
        assert run(program) == f"{name} is blocked\n"


def test_its_files_import_trio_and_the_standard_library() -> None:
    allowed = {"trio", *sys.stdlib_module_names}
    foreign = {
        name
        for file in PACKAGE.glob("*.py")
        for name in imports(ast.parse(file.read_text(encoding="utf-8")))
        if name.partition(".")[0] not in allowed and not name.startswith("ullm.supervision")
    }
    assert foreign == set()


def test_the_pure_parts_know_neither_trio_nor_clocks() -> None:
    for module in ("errors", "policy", "shutdown"):
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        assert imports(tree).isdisjoint({"trio", "time", "logging"})


def imports(tree: ast.AST) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names
