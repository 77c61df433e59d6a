"""Starting worker processes where the system has no room for them, or has lost the working folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import Open, collect, tokens_of
from ullm.actors.transports import spawn as module
from ullm.actors.transports.base import WorkerSpec
from ullm.protocol.messages import RankSpec
from ullm.system.lifeline import Lifeline, Started
from ullm.testing import FakeBehaviour

SPEC = WorkerSpec(RankSpec(), "ullm.testing:ScriptedRunner", None)


class Untied(Lifeline):
    """Ties nobody: no process is started."""

    def started(self, value: Started | None = None) -> None:
        assert value is not None


@pytest.fixture
def lifeline() -> Iterator[Lifeline]:
    with Untied() as found:
        yield found


Opening = Callable[[BaseException, float], list[dict[str, Any]]]


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Opening:
    """Have processes started only after some seconds, an error before; returns options of those started."""

    def prepare(error: BaseException, seconds: float) -> list[dict[str, Any]]:
        started: list[dict[str, Any]] = []
        begin = trio.current_time()

        async def open_process(command: list[str], **options: Any) -> Any:
            if trio.current_time() < begin + seconds:
                raise error
            started.append(options)
            return "process"

        monkeypatch.setattr(trio.lowlevel, "open_process", open_process)
        return started

    return prepare


async def test_a_worker_gets_no_keys(
    clock: MockClock, opening: Opening, lifeline: Lifeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ULLM_API_KEY", "ULLM_ADMIN_KEY", "ULLM_CACHE"):
        monkeypatch.setenv(name, "x")
    started = opening(OSError(errno.ENOMEM, "no"), 0.0)
    await module.spawn(SPEC, lifeline)
    given = {name for name in started[0]["env"] if name.startswith("ULLM_")}
    assert given >= {"ULLM_CACHE"}
    assert not given & {"ULLM_API_KEY", "ULLM_ADMIN_KEY"}


@pytest.mark.parametrize(
    "error",
    [
        BlockingIOError(errno.EAGAIN, "no"),
        OSError(errno.ENOMEM, "no"),
        RuntimeError("can't start new thread"),
    ],
    ids=["processes", "memory", "threads"],
)
async def test_a_shortage_is_waited_for(
    clock: MockClock, opening: Opening, lifeline: Lifeline, error: BaseException
) -> None:
    began = trio.current_time()
    started = opening(error, 2.0)
    await module.spawn(SPEC, lifeline)
    assert len(started) == 1
    assert 2.0 <= trio.current_time() - began < 5.0


async def test_a_shortage_that_lasts_is_an_error(
    clock: MockClock, opening: Opening, lifeline: Lifeline
) -> None:
    began = trio.current_time()
    opening(RuntimeError("can't start new thread"), 1000.0)
    with pytest.raises(OSError, match="can't start new thread"):
        await module.spawn(SPEC, lifeline)
    assert 60.0 <= trio.current_time() - began < 63.0


async def test_other_errors_are_not_waited_for(
    clock: MockClock, opening: Opening, lifeline: Lifeline
) -> None:
    began = trio.current_time()
    opening(FileNotFoundError(errno.ENOENT, "no Python"), 1000.0)
    with pytest.raises(FileNotFoundError):
        await module.spawn(SPEC, lifeline)
    assert trio.current_time() == began


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a folder in use cannot be removed")
async def test_a_working_folder_that_is_gone_is_not_used(
    clock: MockClock,
    opening: Opening,
    lifeline: Lifeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = opening(OSError(), 0.0)
    monkeypatch.syspath_prepend("")
    monkeypatch.chdir(tmp_path)
    await module.spawn(SPEC, lifeline)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    await module.spawn(SPEC, lifeline)
    assert [options["cwd"] for options in started] == [None, "/"]
    first, second = (options["env"]["PYTHONPATH"].split(os.pathsep) for options in started)
    assert first[-1] == str(tmp_path)
    assert not any(entry in ("", str(tmp_path / "gone")) for entry in second)


async def test_workers_that_cannot_start_are_started_again_by_a_backoff(
    clock: MockClock, opened: Open
) -> None:
    """They die as they start, as where they can start no thread, for two seconds."""
    failing = [False]

    def behave(spec: WorkerSpec) -> FakeBehaviour:
        return FakeBehaviour(die_on=lambda message: failing[0])

    async with opened(behave) as (engine, workers):
        expected = tokens_of(await collect(engine))
        failing[0] = True
        workers.started[0].die("was killed")
        await trio.sleep(2.0)
        failing[0] = False
        assert tokens_of(await collect(engine)) == expected
