"""The tutorial: its commands print what the page shows, but for ids, times and process numbers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.process, pytest.mark.slow]

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial" / "first-server.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"(?ms)^## (\d)\. [^\n]*\n(.*?)(?=^## |\Z)", PAGE))
BLOCKS = {number: re.findall(r"(?ms)^```console\n(.*?)^```$", text) for number, text in SECTIONS.items()}
(CLIENT,) = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE)
SPEAKING = (
    "until curl -s http://127.0.0.1:8000/metrics"
    " | grep -q '^ullm_num_requests_running 1.0'; do sleep 0.1; done"
)
"""What stands in for the page's "give it a second" on a machine that may be busy."""
VARYING = re.compile(r'chatcmpl-\w+|"created":\d+|"seconds":[\d.e-]+|silence [\d.]+')
STORY = re.compile(r"(?s)(.{60}\n\d+) characters")
"""What the client prints of the model's text, which depends on the processor's arithmetic."""


def commands(block: str) -> list[tuple[str, str]]:
    """Return the commands of a block with the output that it shows for each."""
    pieces = re.split(r"(?m)^\$ ", block)[1:]
    split = [re.match(r"(?s)(.*?[^\\](?:'\{.*?\}')?)\n(.*)", piece) for piece in pieces]
    return [(match[1], match[2]) for match in split if match]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's client, and the commands ``ullm`` and ``python`` in ``bin``."""
    (tmp_path / "client.py").write_text(CLIENT, "utf-8")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, module in (("ullm", "-m ullm "), ("python", "")):
        (binaries / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (binaries / name).chmod(0o755)
    return tmp_path


@contextmanager
def server(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the page's server; end it by SIGINT, as Ctrl-C does, unless it has ended."""
    ((command, _),) = commands(BLOCKS["2"][0])
    patient = {**os.environ, "ULLM_SHUTDOWN_TIMEOUT": "300"}  # for machines that are busy
    words = [str(folder / "bin" / "ullm"), *command.split()[1:]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=patient) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: ")
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


def run(folder: Path, *blocks: str) -> None:
    """Run the commands of some blocks in one shell, and compare what they print."""
    shell = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    script, expected = "", ""
    for command, output in (each for block in blocks for each in commands(block)):
        curl = command.lstrip().startswith("curl") and "|" not in command
        command = command.replace("sleep 2", SPEAKING)
        script += command + ("\necho\n" if curl else "\n")
        expected += output
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=shell, capture_output=True, text=True, timeout=120
    )
    assert len(set(STORY.findall(done.stdout))) == len(set(STORY.findall(expected))), "not the same each time"
    found, shown = (VARYING.sub("…", STORY.sub("…", text)) for text in (done.stdout, expected))
    assert found == shown, done.stderr


def test_one_question(real_model: Path, folder: Path) -> None:
    run(folder, BLOCKS["1"][0])


def test_probes_and_questions(real_model: Path, folder: Path) -> None:
    with server(folder):
        run(folder, BLOCKS["2"][1], *BLOCKS["3"])


def test_stopping_while_it_speaks(real_model: Path, folder: Path) -> None:
    (telling, asking) = BLOCKS["4"]
    with server(folder) as process:
        interrupt = f"$ {telling.removeprefix('$ ')}$ kill -INT {process.pid}; sleep 0.2\n"
        run(folder, interrupt, asking)


def test_sleeping_and_a_killed_worker(real_model: Path, folder: Path) -> None:
    with server(folder):
        run(folder, *BLOCKS["5"])
        time.sleep(2)  # for the standby worker, which a reader of the page has by then
        run(folder, *BLOCKS["6"])
