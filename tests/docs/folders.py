"""The folders of the package and its layers, for docs/explanation/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ullm
from tests.docs.docstrings import markdown, table
from tests.test_contracts import LAYERS

PACKAGE = Path(ullm.__file__).parent


def folder_table() -> str:
    """Return a row per folder and top-level module: the first paragraph of its docstring."""
    return table(["folder or module", "what lives there"], [[f"`{name}`", text] for name, text in rows()])


def rows() -> Iterator[tuple[str, str]]:
    """Yield the name of each folder and top-level module with a line about it; folders first."""
    for path in sorted(PACKAGE.rglob("__init__.py")):
        if path.parent != PACKAGE:
            yield f"{path.parent.relative_to(PACKAGE.parent).as_posix()}/", _first_paragraph(path)
    for path in sorted(PACKAGE.glob("*.py")):
        yield path.relative_to(PACKAGE.parent).as_posix(), _first_paragraph(path)


def layer_table() -> str:
    """Return a row per layer: what it may import, in the order of the contract."""
    return table(
        ["layer", "may import"],
        [
            [f"`{_shown(layer)}`", ", ".join(_collapsed(allowed)) or "nothing of ullm"]
            for layer, allowed in LAYERS.items()
        ],
    )


def _shown(layer: str) -> str:
    return layer or "ullm/__init__.py"


def _collapsed(allowed: frozenset[str]) -> list[str]:
    """Return the names in the order of the table."""
    order = list(LAYERS)
    return [f"`{name}`" for name in sorted(allowed, key=order.index)]


def _first_paragraph(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return markdown(" ".join(text.split("\n\n")[0].split()))
