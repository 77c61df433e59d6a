"""The Python programs of the how-to pages, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.process, pytest.mark.slow]

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
ADDRESS = "http://127.0.0.1:8000"


def programs_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (HOW_TO / page).read_text("utf-8"), re.DOTALL)


PROGRAMS = programs_of("embedding.md")
SUPERVISED = re.findall(
    r"```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```",
    (HOW_TO / "supervising.md").read_text("utf-8"),
    re.DOTALL,
)


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize(("program", "printed"), SUPERVISED, ids=["words", "processes", "till", "pool"])
def test_a_program_of_the_page_on_supervising_prints_what_it_says(program: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_every_program_of_the_page_on_supervising_has_its_output() -> None:
    assert len(SUPERVISED) == (HOW_TO / "supervising.md").read_text("utf-8").count("```python\n") == 4


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_of_the_page_on_embedding_runs(real_model: Path, number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAMS[number]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if "capital of France" in PROGRAMS[number]:
        assert "Paris" in done.stdout
    else:
        assert "exit code 0" in done.stdout


@pytest.mark.parametrize(
    "page", ["embeddings.md", "stored-answers.md", "structured-outputs.md", "tools.md", "anthropic.md"]
)
def test_the_programs_of_a_page_run_one_after_the_other(real_server: Server, page: str) -> None:
    if page == "anthropic.md":
        pytest.importorskip("anthropic", reason="tests/clients installs it, and runs more of it")
    program = "\n".join(programs_of(page))
    assert ADDRESS in program
    done = subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, real_server.url)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or page == "embeddings.md"
