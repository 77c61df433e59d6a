"""Promises about the package as a whole: layers, exports, light imports, options that explain themselves."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ullm
from ullm.config import EngineConfig, ServerConfig

PACKAGE = Path(ullm.__file__).parent

LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "sampling": {"errors"},
    "logs": set(),
    "machine": set(),
    "messages": {"errors", "config", "sampling"},
    "faults": {"errors", "logs", "messages"},
    "core": {"errors", "config", "sampling", "messages"},
    "hub": {"errors", "config", "logs"},
    "model": {"errors", "config", "sampling", "logs", "machine", "messages", "core", "hub"},
    "actors": {"errors", "config", "sampling", "logs", "machine", "messages", "core", "hub", "faults"},
    "bridge": {"errors", "logs"},
    "supervision": {"errors", "logs", "actors.base"},
    "health": set(),
    "replica": {
        "errors",
        "config",
        "sampling",
        "logs",
        "messages",
        "core",
        "actors",
        "faults",
        "supervision",
        "health",
    },
    "output": {"messages", "core"},
    "generation": {"errors", "config", "sampling", "logs", "messages", "core", "actors", "output"},
}
"""What each layer may import of ullm; layers that are not listed are on top and may import all of it."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield name, path


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Modules that a file imports when it runs, also within functions; not for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_what_is_below(layer: str) -> None:
    found = []
    for name, path in modules():
        if name.split(".")[0] != layer:
            continue
        for imported, node in imports(path):
            if not imported.startswith("ullm."):
                continue
            target = imported.removeprefix("ullm.")
            allowed = LAYERS[layer] | {layer}
            if not any(target == each or target.startswith(f"{each}.") for each in allowed):
                found.append(f"{path.name}:{node.lineno} imports {imported}")
    assert found == []


def test_only_the_model_imports_torch() -> None:
    heavy = ("torch", "transformers", "safetensors.torch")
    found = [
        f"{name}:{node.lineno} {imported}"
        for name, path in modules()
        if name.split(".")[0] not in ("model", "testing") and not name.startswith("bench.scripts.")
        for imported, node in imports(path)
        if imported.startswith(tuple(f"{each}." for each in heavy)) or imported in heavy
    ]
    assert found == []


def test_the_core_imports_neither_trio_nor_threads() -> None:
    found = [
        f"{name}:{node.lineno} {imported}"
        for name, path in modules()
        if name.split(".")[0] in ("core", "errors", "config", "sampling", "messages")
        for imported, node in imports(path)
        if imported.split(".")[0] in ("trio", "asyncio", "threading", "socket", "subprocess")
    ]
    assert found == []


def test_modules_have_no_mutable_globals() -> None:
    found = []
    for name, path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.List | ast.Set):
                target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                if target != "__all__":
                    found.append(f"{name}:{node.lineno} {target}")
        found += [
            f"{name}:{node.lineno} global"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Global)
        ]
    assert found == []


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.process
@pytest.mark.parametrize("module", ["ullm", "ullm.cli", "ullm.hub", "ullm.engine", "ullm.server", "ullm.llm"])
def test_the_front_end_loads_no_model_code(module: str) -> None:
    heavy = "torch", "transformers", "numpy", "ullm.model"
    loaded = in_a_fresh_python(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


@pytest.mark.process
def test_import_ullm_is_light() -> None:
    heavy = "trio", "rich", "tokenizers", "huggingface_hub", "quart", "hypercorn", "cyclopts"
    loaded = in_a_fresh_python(f"import sys, ullm; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"
    took = min(float(in_a_fresh_python(TIMED)) for _ in range(3))
    assert took < 0.3


EXTRAS = {"ray", "opentelemetry"}
"""Packages that only the extras of pyproject.toml install."""

TIMED = "import time; t = time.process_time(); import ullm; print(time.process_time() - t)"


def test_exports() -> None:
    for name in ullm.__all__:
        assert getattr(ullm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ullm.nonsense


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n or "ullm") for n, p in modules()])
def test_every_module_and_public_name_is_documented(name: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    nodes = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    bare = [
        n.name for n in nodes if not n.name.startswith("_") and not ast.get_docstring(n) and n.name != "main"
    ]
    assert bare == []


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_option_has_help(cls: type) -> None:
    for field in dataclasses.fields(cls):
        text = field.metadata.get("help", "")
        assert text.endswith("."), f"{cls.__name__}.{field.name} needs a sentence of help"


def test_no_option_belongs_to_both_configurations() -> None:
    names = [{field.name for field in dataclasses.fields(cls)} for cls in (EngineConfig, ServerConfig)]
    assert names[0] & names[1] == set()


def test_every_module_can_be_imported_by_its_name() -> None:
    for name, _ in modules():
        if name.split(".")[0] == "model" or name.endswith("__main__"):
            continue
        try:
            importlib.import_module(f"ullm.{name}".rstrip("."))
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
