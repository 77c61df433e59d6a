"""Child processes of every kind end with their parent, also if they were suspended while they started."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ullm.system.lifeline import Lifeline, tie

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="lifelines are Linux's")

SECONDS = 60.0
"""A limit for what takes some milliseconds."""

PARENT = """
import os, pathlib, signal, subprocess, sys, time, threading
import trio
import ullm.system.lifeline as module

tied = module.tie

def tie_and_suspend(descriptor, pid, number):
    tied(descriptor, pid, number)
    os.kill(pid, signal.SIGSTOP)
    while pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "T":
        time.sleep(0.001)
    print(pid, flush=True)

module.tie = tie_and_suspend
"""
STARTS = {
    "worker": """
from ullm.actors.transports.base import WorkerSpec
from ullm.actors.transports.process import open_process
from ullm.protocol.messages import RankSpec

async def main():
    async with open_process(WorkerSpec(RankSpec(), "nowhere:Runner", standby=STANDBY)):
        await trio.sleep_forever()

trio.run(main)
""",
    "template": """
from ullm.actors.template_process import _start
process = _start(module.Lifeline())
signal.pause()
""",
    "guarded": """
from ullm.hub.guarded import open_guarded
process = open_guarded(["sleep", "1000"], [pathlib.Path(sys.argv[1])])
signal.pause()
""",
    "command": """
from ullm.cli.child import ask_child
ask_child("ullm.model.describe", b"", 1000, task="examining")
""",
    "calibration": """
import ullm.engine.calibration as calibration
calibration.is_wanted, calibration.DELAY = lambda *arguments: True, 0
from ullm.config import EngineConfig
trio.run(calibration.calibrate_for_next_start, EngineConfig(), "nowhere", None)
""",
    "body": """
from ullm.config import ServerConfig
from ullm.server.api.schemas import CompletionRequest
from ullm.server.large_body import _parsed
trio.run(_parsed, b"{}", CompletionRequest, ServerConfig())
""",
    "part": """
from ullm.cli.orders import Order
from ullm.cli.part import Part
from ullm.config import EngineConfig, ServerConfig
part = Part("engine", Order(EngineConfig(model="/nowhere"), ServerConfig()), lambda part, status: False)
async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(part.run)
trio.run(main)
""",
}
STARTS["standby"] = STARTS["worker"].replace("STANDBY", "True")
STARTS["worker"] = STARTS["worker"].replace("STANDBY", "False")


@pytest.mark.parametrize("kind", sorted(STARTS))
def test_a_child_suspended_at_its_start_ends_with_its_killed_parent(kind: str, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.touch()
    with subprocess.Popen(
        [sys.executable, "-c", PARENT + STARTS[kind], str(unfinished)], stdout=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            handle = os.pidfd_open(child)
        finally:
            parent.kill()
    try:
        assert ended(handle), f"process {child} outlives its parent"
    finally:
        if not ended(handle, 0):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    assert unfinished.exists() == (kind != "guarded")


def ended(handle: int, seconds: float = SECONDS) -> bool:
    """Return whether a process ends within some seconds."""
    return bool(select.select([handle], [], [], seconds)[0])


def test_a_lifeline_lives_as_long_as_its_context() -> None:
    with subprocess.Popen(["sleep", "1000"], pass_fds=(lifeline := Lifeline()).pass_fds) as child:
        with lifeline:
            lifeline.started(child)
            assert child.poll() is None
        assert child.wait(SECONDS) == -signal.SIGKILL


def test_a_process_that_has_ended_is_tied_to_nothing() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    theirs, ours = os.pipe()
    tie(theirs, child.pid, signal.SIGKILL)
    os.close(ours)
    os.close(theirs)
