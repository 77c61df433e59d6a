"""Programs that fork beside an engine of theirs, as gunicorn does with ``--preload``."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.server import Serve, is_gone
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks"),
]


def test_a_forked_child_is_told_and_keeps_no_worker(serve: Serve, scripted_model: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("forking.py")), str(scripted_model)]
    program = serve(command=command, ready=r"^(parent goes on)")
    eventually(lambda: "child lives" in program.output)
    said = re.findall(r"(?m)^child (\w+) engine_forked (.+)$", program.output)
    assert [name for name, _ in said] == ["generate_sync", "generate", "ready", "abort", "stream"]
    assert all("make the LLM after the fork" in message for _, message in said)

    child = psutil.Process(int(re.findall(r"child lives (\d+)", program.output)[0]))
    eventually(lambda: len(program.workers()) == 2)  # one serves, one stands by
    workers = program.workers()
    program.signal(signal.SIGKILL)
    began = time.monotonic()
    eventually(lambda: all(is_gone(worker) for worker in workers))
    assert time.monotonic() - began < 1
    assert not is_gone(child)
    child.kill()
