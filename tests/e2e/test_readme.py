"""Every snippet of the README, run as it stands there; only the port is another."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.process]

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "bash"]
ADDRESS = "http://127.0.0.1:8000"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_snippets() -> None:
    assert len(PYTHON) == 3
    assert len(SHELL) == 1


@pytest.mark.parametrize("page", sorted([README, *(README.parent / "docs").rglob("*.md")]))
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    named = re.findall(r"`((?:tests|ullm)/[\w/.]+)`", text) + re.findall(r"\]\(([\w/.]+\.md)\)", text)
    missing = [
        name for name in named if not (README.parent / name).exists() and not (page.parent / name).exists()
    ]
    assert not missing


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2))])
def test_python(real_server: Server, number: int) -> None:
    says = run(sys.executable, "-W", "error", "-c", PYTHON[number].replace(ADDRESS, real_server.url))
    assert says.strip()
    if "capital of France" in PYTHON[number]:
        assert "Paris" in says, says


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("number", range(len(SHELL)))
def test_shell(real_server: Server, number: int) -> None:
    says = run("bash", "-c", SHELL[number].replace(ADDRESS, real_server.url))
    assert '"content":" Paris"' in says
    assert says.rstrip().endswith("data: [DONE]")


def test_the_first_command_says_paris(real_model: Path) -> None:
    (command,) = re.findall(r'&& \.venv/bin/ullm (generate ".*?")', README.read_text("utf-8"))
    question = command.split('"')[1]
    assert (
        run(sys.executable, "-m", "ullm", "generate", question).strip() == "The capital of France is Paris."
    )
