"""Commands whose output nobody takes say so: stdout is named where it was stdout, and only there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no device that is full"),
]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["serve", "--help"], ["doctor", "--json"]])
def test_a_full_stdout_is_named(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ullm", *arguments],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stderr == "error: stdout: No space left on device\n"
    assert done.returncode == 1


CLOSED = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'ullm', '--version'])"


def test_a_closed_stdout_takes_everything() -> None:
    """The null device has taken its place."""
    done = subprocess.run([sys.executable, "-c", CLOSED], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


OTHER = """
import sys
from ullm.cli import app

def fail(*arguments, **options):
    raise OSError(28, "No space left on device")

app.build = fail
sys.exit(app.main(["doctor"]))
"""


def test_another_error_without_a_file_is_not_told_as_stdout() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OTHER], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")
