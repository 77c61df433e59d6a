"""Corrupt files: each is refused in one line, or what it says can be run; in bounded time and memory.

Many are tried in one process of its own, which a crash, a hang or too much memory would end.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.model.loading.corrupt_child import KINDS

LIMIT = 450
"""Seconds for some hundred cases, most of which take less than 0.1 s on a machine at rest."""
ALLOCATION = re.compile(r"alloc|MemoryError|std::bad|out of memory", re.IGNORECASE)
"""What an error says that was found only when memory was wanted."""


def run(folder: Path, seeds: range, *kinds: str) -> list[dict[str, Any]]:
    """Start models with a damaged file; return what became of them, after the process has ended well."""
    where = [str(folder), str(seeds.start), str(seeds.stop)]
    command = [sys.executable, "-m", "tests.model.loading.corrupt_child", *where, *kinds]
    root = Path(__file__).parents[3]
    found = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=root, check=False)
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.returncode == 0, f"ended by {found.returncode} after {rows[-1:]}: {found.stderr[-2000:]}"
    return [row for row in rows if "damage" not in row]


def check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert "fault" not in row, row["fault"]
        for message in (row.get("refused", ""), row.get("last", "")):
            assert "\n" not in message, row
            assert len(message) < 600, row
            assert not ALLOCATION.search(message), row


@pytest.mark.process
def test_a_few_corrupt_files(tmp_path: Path) -> None:
    rows = run(tmp_path, range(12, 13), *KINDS)
    assert len(rows) == len(KINDS)
    check(rows)
    assert sum("refused" in row for row in rows) > len(KINDS) // 2


@pytest.mark.slow
@pytest.mark.process
def test_some_corrupt_files(tmp_path: Path) -> None:
    rows = run(tmp_path, range(14, 54), *KINDS)
    check(rows)
    assert sum("refused" in row for row in rows) > 20 * len(KINDS)


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_corrupt_files(kind: str, tmp_path: Path) -> None:
    rows = run(tmp_path, range(1000), kind)
    assert len(rows) == 1000
    check(rows)
