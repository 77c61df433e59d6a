"""Calibration beside the first start: after it, once, at its end, and never where it is of no use."""

from __future__ import annotations

import os
import subprocess
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from ullm.actors.router import Router
from ullm.actors.transports.base import Transport, WorkerSpec
from ullm.config import EngineConfig, Tuning
from ullm.engine import calibration
from ullm.engine.calibration import calibrate_for_next_start, is_wanted
from ullm.engine.fleet import Fleet
from ullm.faults import FaultInjector
from ullm.hub import LocalModel
from ullm.hub.tuning import write_tuning
from ullm.protocol.messages import ModelInfo

INFO = ModelInfo("Llama", 1, 1, (), 1, 1, 1, "float32", "cpu", tuning="default")
CONFIG = EngineConfig(model="m", transport="process")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULLM_CACHE", str(tmp_path))


def test_it_is_wanted_once_and_only_for_the_cpu_kernels() -> None:
    assert is_wanted(CONFIG, "/m", INFO)
    assert not is_wanted(replace(CONFIG, cpu_calibration=False), "/m", INFO)
    assert not is_wanted(replace(CONFIG, cpu_kernels=False), "/m", INFO)
    assert not is_wanted(replace(CONFIG, runner="a:B"), "/m", INFO)
    assert not is_wanted(replace(CONFIG, transport="fake"), "/m", INFO)
    assert not is_wanted(CONFIG, "/m", msgspec.structs.replace(INFO, tuning=""))
    write_tuning(CONFIG, "/m", Tuning())
    assert not is_wanted(CONFIG, "/m", INFO)


async def test_it_runs_after_a_delay_and_reports_failure(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun: list[float] = []

    async def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        begun.append(trio.current_time())
        return subprocess.CompletedProcess(command, 1, b"", b"Traceback\nno space left\n")

    monkeypatch.setattr(trio, "run_process", run)
    before = trio.current_time()
    await calibrate_for_next_start(CONFIG, "/m", INFO)
    assert begun == [before + calibration.DELAY]
    assert [vars(record)["reason"] for record in caplog.records] == ["no space left"]


async def test_its_process_ends_with_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    os.mkfifo(note)
    monkeypatch.setattr(calibration, "DELAY", 0.0)
    write = f"pathlib.Path({str(note)!r}).write_text(str(os.getpid()))"
    program = f"import os, pathlib, time; {write}; time.sleep(1000)"
    monkeypatch.setattr(calibration, "PROGRAM", program)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(calibrate_for_next_start, CONFIG, "/m", INFO)
        with trio.fail_after(20):
            pid = await trio.to_thread.run_sync(note.read_text, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


async def test_every_replica_gets_the_one_choice_that_the_engine_has_made() -> None:
    tuning = Tuning(4, 48, False, "calibrated on 2026-01-02", "m")
    write_tuning(CONFIG, "/m", tuning)
    config = replace(CONFIG, replicas=2)
    fleet = Fleet(config, Router(config, FaultInjector()), unused, lambda _: None, FaultInjector())
    fleet.specs(LocalModel("m", Path("/m"), {}, Path("/m")))
    assert [replica.group.tuning for replica in fleet.replicas] == [tuning, tuning]
    write_tuning(CONFIG, "/m", Tuning(16))  # by another process, meanwhile
    assert fleet.tuning == tuning
    switched_off = replace(config, cpu_calibration=False)
    plain = Fleet(switched_off, Router(config, FaultInjector()), unused, lambda _: None, FaultInjector())
    plain.specs(LocalModel("m", Path("/m"), {}, Path("/m")))
    assert plain.tuning == Tuning()


def unused(spec: WorkerSpec) -> AbstractAsyncContextManager[Transport]:
    raise AssertionError(f"no worker is started: {spec}")
