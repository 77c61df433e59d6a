"""Benchmarks that are stopped end what they have started."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio

pytestmark = pytest.mark.process
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_servers_too(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "front-end", "--log", str(tmp_path / "log")]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, command, capture_stderr=True, check=False, cwd=REPOSITORY)
            process = await nursery.start(run)
            servers: list[psutil.Process] = []
            while not servers:
                children = psutil.Process(process.pid).children(recursive=True)
                servers = [child for child in children if "serve" in child.cmdline()]
                await trio.sleep(0.05)
            process.send_signal(number)
    assert process.returncode == 128 + number
    gone, alive = await trio.to_thread.run_sync(lambda: psutil.wait_procs(servers, timeout=10))
    assert gone
    assert not alive
