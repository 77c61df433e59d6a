"""Anthropic's own client against the real model, in a virtual environment that the test makes."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.clients import anthropic_cases
from tests.support.server import starting_servers

pytestmark = [pytest.mark.long, pytest.mark.process]


def test_anthropics_client_gets_what_it_asks_for(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *anthropic_cases.PACKAGES], check=True, timeout=600)
    with starting_servers() as start:
        server = start("--dtype", "float32", "--no-cpu-kernels")
        program = [python, anthropic_cases.__file__, server.url]
        done = subprocess.run(program, capture_output=True, text=True, timeout=600, check=True)
    failed = [line for line in done.stdout.splitlines() if ": " in line and not line.endswith(": passed")]
    assert failed == []
    assert done.stdout.count(": passed") == len(anthropic_cases.CASES)
