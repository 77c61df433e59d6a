"""A standby worker's process: prepared, started, and no burden on others meanwhile."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from ullm.actors.transports.process import open_process
from ullm.errors import WorkerLost
from ullm.protocol.messages import Ping, Pong, Prepare, Prepared, Progress, Ready, StepResult
from ullm.worker.low_priority import EXTRA_NICENESS, MAX_NICENESS

pytestmark = pytest.mark.process


def standby(talk, runner="ScriptedRunner"):
    return replace(talk.spec(runner), standby=True)


def prepare(talk):
    start = talk.start()
    return Prepare(start.config, start.rank, start.model_path)


async def test_prepare_then_start(talk):
    async with open_process(standby(talk)) as worker:
        await worker.send(prepare(talk))
        await talk.until(worker, Prepared)
        await worker.send(Ping(1))
        assert await talk.until(worker, Pong) == Pong(1)
        await talk.load(worker)
        await worker.send(talk.step())
        assert isinstance(await worker.receive(), StepResult)
        assert (await worker.stop(5)).outcome == "stopped"


async def test_start_without_prepare(talk):
    async with open_process(standby(talk)) as worker:
        assert isinstance(await talk.load(worker), Ready)


async def test_a_prepared_worker_stops_at_once(talk):
    async with open_process(standby(talk)) as worker:
        await worker.send(prepare(talk))
        await talk.until(worker, Prepared)
        report = await worker.stop(60)
    assert report.outcome == "stopped"
    assert report.seconds < 1


async def test_a_stop_interrupts_the_import(talk, monkeypatch, tmp_path):
    (tmp_path / "takes_long_to_import.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = replace(standby(talk), runner="takes_long_to_import:Runner")
    async with open_process(spec) as worker:
        assert (await talk.until(worker, Progress)).stage == "import"
        report = await worker.stop(60)
    assert report.outcome == "stopped"
    assert report.seconds < 1


async def test_another_name_is_used_in_errors(talk):
    async with open_process(standby(talk)) as worker:
        worker.name = "replica7.rank0"
        worker.kill()
        with pytest.raises(WorkerLost, match=r"replica7\.rank0 was killed by SIGKILL"):
            await talk.until(worker, Ready)


@pytest.mark.skipif(sys.platform != "linux", reason="priorities as on Linux")
def test_only_the_import_gives_way(tmp_path):
    (tmp_path / "looks.py").write_text(
        "import os, threading\nhere = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())\n"
    )
    program = """
        import os
        from ullm.worker.low_priority import AUTOGROUP, import_at_low_priority
        import_at_low_priority("looks")
        import looks
        group = AUTOGROUP.read_text().split()[-1] if AUTOGROUP.exists() else 0
        print(looks.here, os.getpriority(os.PRIO_PROCESS, 0), group)
        import_at_low_priority("no_such_module")
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*filter(None, sys.path), str(tmp_path)]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=True,
    )
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert done.stdout.split() == [str(min(before + EXTRA_NICENESS, MAX_NICENESS)), str(before), "0"]
    assert done.stderr == ""
