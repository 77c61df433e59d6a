"""Promises about the package as a whole: layers, exports, light imports, options that explain themselves."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ullm
from ullm.config import EngineConfig, ServerConfig

PACKAGE = Path(ullm.__file__).parent

_BASE = frozenset({"errors", "logs", "config", "sampling", "machine", "system", "protocol"})
_ENGINE = _BASE | {
    "parsing",
    "grammars",
    "scheduling",
    "tokenization",
    "supervision",
    "faults",
    "hub",
    "worker",
    "actors",
}

LAYERS: dict[str, frozenset[str]] = {
    # a library of its own
    "supervision": frozenset(),
    # plain modules
    "errors": frozenset({"supervision"}),
    "logs": frozenset(),
    "machine": frozenset(),
    "system": frozenset(),
    "release": frozenset(),
    "config": frozenset({"errors"}),
    "grammars": frozenset({"errors"}),
    "sampling": frozenset({"errors", "grammars"}),
    "parsing": frozenset({"errors", "grammars", "sampling"}),
    # what engine and worker share
    "protocol": frozenset({"errors", "config", "sampling"}),
    "tls": frozenset({"errors", "config"}),
    "scheduling": frozenset({"errors", "config", "sampling", "protocol"}),
    "tokenization": frozenset({"errors", "logs", "parsing"}),
    "hub": frozenset({"errors", "config", "logs", "system"}),
    "faults": frozenset({"errors", "logs", "protocol"}),
    "journal": frozenset({"errors", "logs"}),
    # the worker
    "worker": frozenset({"errors", "logs", "machine", "system", "protocol"}),
    "model": _BASE | {"grammars", "scheduling", "tokenization", "hub"},
    "model.memory": frozenset({"errors", "config", "logs", "machine"}),
    "model.sampling": frozenset({"grammars", "sampling", "protocol", "model.memory"}),
    "model.attention": frozenset({"errors", "model.memory", "model.sampling"}),
    "model.layers": frozenset({"errors", "logs", "machine", "protocol", "model.sampling", "model.attention"}),
    "model.loading": frozenset({"errors", "config", "logs", "hub", "model.layers"}),
    "model.kernels": frozenset(
        {
            "errors",
            "logs",
            "machine",
            "hub",
            "model.memory",
            "model.sampling",
            "model.attention",
            "model.layers",
        }
    ),
    "model.architectures": frozenset(
        {"errors", "logs", "config", "machine", "model.memory", "model.sampling", "model.attention"}
        | {"model.layers", "model.loading", "model.kernels"}
    ),
    "model.execution": _BASE | {"grammars", "scheduling", "tokenization", "model"},
    # the engine
    "actors": _ENGINE - {"actors"},
    "nodes": frozenset(
        {"supervision", "errors", "logs", "system", "config", "protocol", "hub", "actors", "release", "tls"}
    ),
    "engine": _ENGINE | {"nodes"},
    "link": _ENGINE | {"engine", "release", "tls"},
    # its surfaces
    "hosting.bridge": frozenset({"errors", "system"}),
    "llm_host": frozenset({"errors", "config", "parsing", "sampling", "tokenization", "engine"}),
    "llm": frozenset({"errors", "config", "parsing", "sampling", "engine", "hosting.bridge", "llm_host"}),
    "server.api": _BASE | {"grammars", "parsing", "tokenization", "supervision", "engine"},
    "server.http": frozenset({"errors", "logs", "system", "tls", "server.api"}),
    "server.stored": _BASE | {"parsing", "supervision", "hub", "journal", "engine", "server.api"},
    "server.routes": _BASE
    | {"grammars", "parsing"}
    | {"supervision", "engine", "server.api", "server.http", "server.stored", "server"},
    "server": _BASE | {"supervision", "hub", "journal", "engine"},
    "hosting": _BASE | {"supervision", "engine", "link", "server", "tls"},
    "app": frozenset({"hosting"}),
    "client": frozenset({"errors"}),
    "bench": frozenset({"errors", "config", "sampling", "engine", "client"}),
    "testing": _ENGINE | {"engine", "client"},
    "chaos": frozenset({"errors", "system", "faults", "client", "bench", "testing"}),
    "cli": _BASE
    | {"supervision", "hub", "engine", "link", "server", "hosting", "client", "bench", "testing", "chaos"}
    | {"nodes", "tls"},
    "entrypoints": frozenset({"cli"}),
    "__main__": frozenset({"cli"}),
    "": frozenset({"release", "config", "sampling", "engine", "llm"}),
}
"""What each folder and top-level module may import of ullm, besides itself; "" is ``ullm/__init__.py``.

A folder that names another one may import its subfolders, too; a subfolder has a line of its own where it
is held to less than its parent.
"""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield name, path


def imports(path: Path, *, typing_only_too: bool = False) -> Iterator[tuple[str, ast.stmt]]:
    """Modules that a file imports when it runs, also within functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only and not typing_only_too:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


def layer_of(name: str) -> str:
    """The line of LAYERS that a module is held to: the most special one."""
    parts = name.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in LAYERS), "")


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_what_is_below(layer: str) -> None:
    found = []
    for name, path in modules():
        if layer_of(name) != layer:
            continue
        for imported, node in imports(path):
            if not imported.startswith("ullm."):
                continue
            target = imported.removeprefix("ullm.")
            allowed = LAYERS[layer] | ({layer} if layer else {"__version__"})
            if not any(target == each or target.startswith(f"{each}.") for each in allowed):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} imports {imported}")
    assert found == []


def test_every_folder_has_a_layer() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts for _, path in modules()} - {()}
    tops = {(path.stem,) for path in PACKAGE.glob("*.py")} - {("__init__",)}
    assert {parts[0] for parts in folders | tops} == {layer.split(".")[0] for layer in LAYERS if layer}
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def test_layers_are_in_order() -> None:
    """Each layer names only layers above it in the table, so that there is no circle between folders."""
    seen: set[str] = set()
    for layer, allowed in LAYERS.items():
        below = {each for each in allowed if not layer.startswith(f"{each}.") and not each.startswith(layer)}
        assert below <= seen | {layer}, (layer, below - seen)
        seen |= {layer, layer.split(".")[0]}


def test_there_is_no_circle_of_imports() -> None:
    """Between files, imports within functions and for type checking counted: a reader follows them, too."""
    paths = {f"ullm.{name}".rstrip("."): path for name, path in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        named = {imported for imported, _ in imports(path, typing_only_too=True)}
        targets = {imported if imported in paths else imported.rpartition(".")[0] for imported in named}
        graph[name] = (targets & paths.keys()) - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_only_the_model_imports_torch() -> None:
    heavy = ("torch", "transformers", "safetensors.torch")
    found = [
        f"{name}:{node.lineno} {imported}"
        for name, path in modules()
        if name.split(".")[0] not in ("model", "testing")
        for imported, node in imports(path)
        if imported.startswith(tuple(f"{each}." for each in heavy)) or imported in heavy
    ]
    assert found == []


def test_the_core_imports_neither_trio_nor_threads() -> None:
    found = [
        f"{name}:{node.lineno} {imported}"
        for name, path in modules()
        if name.split(".")[0] in ("scheduling", "tokenization", "protocol", "errors", "config", "sampling")
        for imported, node in imports(path)
        if imported.split(".")[0] in ("trio", "asyncio", "threading", "socket", "subprocess")
    ]
    assert found == []


CONTAINERS = {"list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter", "array"}
CONTAINERS |= {
    "WeakSet",
    "WeakKeyDictionary",
    "WeakValueDictionary",
    "local",
    "Queue",
    "SimpleQueue",
    "count",
}
CHANGES = {"append", "extend", "insert", "remove", "pop", "popitem", "clear", "add", "discard", "update"}
CHANGES |= {"setdefault", "sort", "reverse", "appendleft", "popleft", "extendleft"}


def mutable_globals(tree: ast.Module) -> Iterator[str]:
    """Yield the module's names that hold state: containers that are made to be filled, or are changed.

    A dict with content is a table, as long as nothing in the module changes it.
    """
    tables = set()
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        match node.value:
            case ast.Dict(keys=[_, *_]):
                tables.add(name)
            case ast.List() | ast.Set() | ast.Dict() | ast.ListComp() | ast.SetComp() if name != "__all__":
                yield name
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called)) if called in CONTAINERS:
                yield name
    yield from tables & {ast.unparse(changed) for changed in changed_things(tree)}
    yield from (name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names)


def changed_things(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield what is assigned into, deleted from, or changed by a method."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
                yield value
            case ast.AugAssign(target=target):
                yield target
            case ast.Call(func=ast.Attribute(value=value, attr=method)) if method in CHANGES:
                yield value


def test_modules_have_no_mutable_globals() -> None:
    assert [
        f"{name}: {each}"
        for name, path in modules()
        for each in mutable_globals(ast.parse(path.read_text(encoding="utf-8")))
    ] == []


@pytest.mark.parametrize(
    "source",
    [
        "x = []",
        "x: dict[str, int] = {}",
        "x = {1}",
        "x = dict()",
        "x = list(y)",
        "x = set()",
        "x = defaultdict(int)",
        "x = collections.deque()",
        "x = [n for n in y]",
        "x = {1: 2}\ndef f():\n    x[3] = 4",
        "x = {1: 2}\ndef f():\n    x.update(y)",
        "def f():\n    global x\n    x = 2",
    ],
)
def test_a_mutable_global_would_be_found(source: str) -> None:
    assert list(mutable_globals(ast.parse(source))) == ["x"]


@pytest.mark.parametrize("source", ["x = (1, 2)", "x = frozenset({1})", "x = {1: 2}\ny = x[1]", "x = f()"])
def test_constants_are_no_mutable_globals(source: str) -> None:
    assert list(mutable_globals(ast.parse(source))) == []


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


EXTRAS = {"ray", "trio_asyncio", "opentelemetry"}
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


POSIX_ONLY = frozenset(
    {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty", "crypt"}
)
"""Modules of the standard library that Windows does not have."""


def test_one_file_imports_what_only_posix_has() -> None:
    """Elsewhere such an import fails on Windows, maybe in a function that no test calls there."""
    found = {
        (name, imported)
        for name, path in modules()
        for imported, _ in imports(path)
        if imported.partition(".")[0] in POSIX_ONLY
    }
    assert {name for name, _ in found} == {"system.posix"}


def test_fast_tests_run_on_the_other_systems() -> None:
    """GitHub's runners for Windows, macOS and ARM; .ci/run is Linux on x86-64."""
    workflow = (PACKAGE.parent / ".github" / "workflows" / "fast-tests.yml").read_text("utf-8")
    for system in ("windows-", "macos-", "ubuntu-24.04-arm"):
        assert system in workflow
    assert "python -m pytest -q\n" in workflow
