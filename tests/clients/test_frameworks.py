"""Other people's clients against the real model, each in an environment that the test makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import frameworks, more_frameworks
from tests.support.server import Server, starting_servers

pytestmark = [pytest.mark.long, pytest.mark.process, pytest.mark.timeout(3000)]

FOLDER = Path(__file__).parent
LANGCHAIN_CHOICE = "TestUllm and not structured_output or TestRepeatingLess and structured_output"
"""A small model fills free texts without end unless it must not repeat itself, and copies numbers wrongly if
it must not."""
NODE_PACKAGES = ("ai@6", "@ai-sdk/openai-compatible@2", "openai@6", "zod@4")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with starting_servers() as start:
        yield start("--dtype", "float32")


def environment(folder: Path, *packages: str) -> Path:
    """Make a virtual environment; return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, timeout=1200)
    return python


def told(*command: str | Path, **options: object) -> list[str]:
    """Return what a program says of each of its cases."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True, **options)  # type: ignore[call-overload]
    return [line for line in done.stdout.splitlines() if ": " in line]


@pytest.mark.parametrize("program", [frameworks, more_frameworks], ids=["current", "older"])
def test_frameworks_get_what_they_ask_for(server: Server, tmp_path: Path, program: object) -> None:
    python = environment(tmp_path / "venv", *program.PACKAGES)  # type: ignore[attr-defined]
    lines = told(python, program.__file__, f"{server.url}/v1")  # type: ignore[attr-defined]
    assert [line for line in lines if not line.endswith(": passed")] == []
    assert len(lines) >= len(program.CASES)  # type: ignore[attr-defined]


def test_langchains_standard_tests_pass(server: Server, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "langchain-tests", "langchain-openai", "pytest")
    shutil.copy(FOLDER / "langchain_standard.py", tmp_path)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_test_loop_scope = session\n"
        "asyncio_default_fixture_loop_scope = session\n"
    )
    chosen = ["langchain_standard.py", "-k", LANGCHAIN_CHOICE]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", *chosen]
    environ = os.environ | {"ULLM_URL": f"{server.url}/v1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
@pytest.mark.parametrize("program", ["ai_sdk.mjs", "openai_node.mjs"])
def test_clients_for_node_get_what_they_ask_for(server: Server, tmp_path: Path, program: str) -> None:
    npm = str(shutil.which("npm"))
    install = [npm, "install", "--no-audit", "--no-fund", "--prefix", tmp_path, *NODE_PACKAGES]
    subprocess.run(install, check=True, timeout=600, capture_output=True)
    shutil.copy(FOLDER / program, tmp_path)
    lines = told("node", program, f"{server.url}/v1", cwd=tmp_path)
    assert [line for line in lines if not line.endswith(": passed")] == []
    assert len(lines) >= 3
