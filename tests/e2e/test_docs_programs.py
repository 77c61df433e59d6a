"""The Python programs of the how-to pages, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.process, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "embedding.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


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
