"""What the plugin says: about a test that fails, one that has tested nothing, and one on another loop."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import eventually
from tests.testing.test_plugin import PLUGIN, run

pytestmark = pytest.mark.process

SUITE = """
import pytest, trio
from ullm import SamplingParams
from ullm.faults import point

GREEDY = SamplingParams(temperature=0, max_tokens=10)

async def complete(engine):
    async with engine.generate([300], GREEDY) as generation:
        return [output async for output in generation]

async def test_fails(ullm_clock, ullm_engine, ullm_faults):
    async with ullm_engine(step_seconds=1.0) as engine:
        ullm_faults.arm("worker.step:crash@nth=4; seed=3")
        await complete(engine)
    assert False, "by itself"

async def test_never_fires(ullm_clock, ullm_engine):
    async with ullm_engine(step_seconds=1.0, faults="worker.step:crash@nth=400") as engine:
        await complete(engine)

async def test_is_lenient(ullm_clock, ullm_engine, ullm_faults):
    ullm_faults.strict = False
    async with ullm_engine(step_seconds=1.0, faults="worker.step:crash@nth=400") as engine:
        await complete(engine)

def test_has_nothing_it_could_happen_to(ullm_faults):
    ullm_faults.arm("worker.step:crash")

async def test_clears(ullm_clock, ullm_engine, ullm_faults):
    async with ullm_engine(step_seconds=1.0) as engine:
        ullm_faults.arm("worker.step:crash@nth=400")
        await complete(engine)
        ullm_faults.clear()

async def test_of_a_program_of_its_own(ullm_faults):
    ullm_faults.arm("ledger.write:raise@nth=2")
    await point("ledger.write")
    with pytest.raises(Exception, match="injected fault"):
        await point("ledger.write")
    assert [fired.hit for fired in ullm_faults.history] == [2]

async def test_of_a_program_that_never_gets_there(ullm_faults):
    ullm_faults.arm("ledger.wirte:raise")
    await point("ledger.write")
"""


def test_a_test_that_fails_says_what_was_injected(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    (tmp_path / "test_suite.py").write_text(SUITE)
    done = run(tmp_path, "-W", "error")
    said = done.stdout
    assert "4 failed, 3 passed" in said, said + done.stderr
    assert "Injected faults" in said
    assert "plan   worker.step:crash@nth=4,seed=3" in said
    assert "armed  #1 worker.step:crash@nth=4: 4 hits, fired 1 times" in said
    assert re.search(
        r"fired  #1 worker\.step:crash at hit 4 .*: worker lost: was killed by SIGKILL, there", said
    )
    assert "again  ULLM_FAULTS='worker.step:crash@nth=4'" in said
    assert "test   pytest 'test_suite.py::test_fails'" in said
    assert re.search(
        r"armed and never fired: worker\.step:crash@nth=400 \(\d+ hits\); if that is meant", said
    )
    assert "worker.step:crash was armed, and nothing was there that it could happen to" in said
    assert "armed and never fired: ledger.wirte:raise (0 hits)" in said


OTHER_LOOPS = """
import pytest

@pytest.mark.anyio
async def test_engine_on_asyncio(ullm_engine):
    async with ullm_engine() as engine:
        pass

@pytest.mark.anyio
async def test_clock_of_anyio(ullm_clock):
    pass

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""


@pytest.mark.skipif(
    not any(entry.name == "anyio" for entry in importlib.metadata.entry_points(group="pytest11")),
    reason="needs anyio's plugin",
)
def test_other_event_loops_get_a_line_and_no_silence(tmp_path: Path) -> None:
    (tmp_path / "test_loops.py").write_text(OTHER_LOOPS)
    others = ("-p", "no:xdist", "-p", "no:trio", "-p", "no:schemathesis")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *others, *PLUGIN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "ullm_engine needs trio, and this test runs on asyncio" in done.stdout, done.stdout + done.stderr
    assert "ullm_clock: only pytest-trio runs a test on this clock" in done.stdout


SHARED = """
import pytest

@pytest.fixture
def server(ullm_module_server, ullm_faults):
    server = ullm_module_server("--served-model-name", "m")
    with ullm_faults.also_in(server.faults):
        yield server

seen = []

@pytest.mark.parametrize("number", range(3))
def test_one_of_three(server, ullm_faults, number):
    seen.append(server.process.pid)
    assert len(set(seen)) == 1
    assert not ullm_faults.history
    ullm_faults.arm("worker.step:crash@nth=3")
    body = {"model": "m", "prompt": [300], "max_tokens": 10, "temperature": 0}
    assert server.request("POST", "/v1/completions", body)[0] == 200
    assert len(ullm_faults.history) == 1
    assert server.request("POST", "/sleep", {"level": 1})[0] == 200

def test_one_that_ends_it(server):
    server.close()

def test_and_another(server):
    assert server.process.pid not in seen
    assert server.request("GET", "/v1/models")[1]["data"][0]["id"] == "m"
"""


SHARED_FAULTS = """
import pytest

def complete(server):
    body = {"model": "m", "prompt": [300], "max_tokens": 10, "temperature": 0}
    assert server.request("POST", "/v1/completions", body)[0] == 200

def server_of(shared):
    return shared("--served-model-name", "m")

@pytest.fixture
def server(ullm_module_server):
    return server_of(ullm_module_server)

def test_arms_it_itself_and_in_vain(server):
    server.faults.arm("worker.step:crash@nth=900")

def test_fires_and_fails(ullm_module_server):
    server = server_of(ullm_module_server)
    server.faults.arm("worker.step:crash@nth=3")
    complete(server)
    assert False, "by itself"

@pytest.mark.parametrize("first", [True, False])
def test_the_fixture_reaches_it(ullm_module_server, ullm_faults, first):
    if first:
        ullm_faults.arm("worker.step:crash@nth=3")
    server = server_of(ullm_module_server)
    if not first:
        ullm_faults.arm("worker.step:crash@nth=3")
    complete(server)
    assert len(ullm_faults.history) == 1

def test_joins_once(server, ullm_faults):
    with ullm_faults.also_in(server.faults):
        ullm_faults.arm("worker.step:crash@nth=3")
    complete(server)
    assert len(ullm_faults.history) == 1

def test_is_lenient(server, ullm_faults):
    ullm_faults.strict = False
    server.faults.arm("worker.step:crash@nth=900")

def test_knows_nothing_of_the_others(server, ullm_faults):
    assert not ullm_faults.history
    assert not server.faults.describe().armed
"""


def test_faults_in_shared_servers_are_those_of_the_test(tmp_path: Path) -> None:
    (tmp_path / "test_shared.py").write_text(SHARED_FAULTS)
    done = run(tmp_path)
    assert "2 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    assert "armed and never fired: worker.step:crash@nth=900 (0 hits)" in done.stdout
    assert "fired  #" in done.stdout
    assert "test   pytest 'test_shared.py::test_fires_and_fails'" in done.stdout


def test_servers_are_shared_and_reset_and_take_no_exported_options(tmp_path: Path) -> None:
    (tmp_path / "test_shared.py").write_text(SHARED)
    environ = {"ULLM_SERVED_MODEL_NAME": "exported", "ULLM_MAX_BS": "nonsense", "ULLM_FAULTS": "nonsense"}
    done = run(tmp_path, environ=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


KILLED = """
import pathlib, time

def test_waits(ullm_server):
    server = ullm_server()
    pathlib.Path("pid").write_text(str(server.process.pid))
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_server_ends_with_a_killed_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_killed.py").write_text(KILLED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *PLUGIN]
    suite = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    eventually(lambda: pid.exists() and pid.read_text() != "", 60)
    server = psutil.Process(int(pid.read_text()))
    below = [server, *server.children(recursive=True)]
    suite.send_signal(signal.SIGKILL)
    suite.wait()
    eventually(lambda: not any(process.is_running() for process in below), 20)
