"""Servers under disturbances: what is done to them, what is measured, and how it is judged."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from tests.benchmarks.compare import comparison_rounds
from tests.benchmarks.compare.candidates import ServerCandidate, transformers_candidate
from tests.benchmarks.compare.comparison_rounds import Turn
from tests.benchmarks.compare.hardware import Limits, machine
from tests.benchmarks.compare.scenarios import Figures, RequestsFailed
from tests.benchmarks.compare.test_compare import SCRIPT
from tests.benchmarks.disturbance import (
    control_group,
    disturbance_load,
    disturbance_report,
    disturbance_rounds,
    disturbances,
)
from tests.benchmarks.disturbance.control_group import (
    CpuController,
    QuotaUnavailable,
    enter,
    find_controller,
    quota_group,
)
from tests.benchmarks.disturbance.disturbance_command import choose_disturbances
from tests.benchmarks.disturbance.disturbance_load import (
    DisturbanceLoad,
    LevelMetrics,
    Prober,
    Spent,
    look,
    run_level,
    wait_until_quiet,
)
from tests.benchmarks.disturbance.disturbance_report import DisturbanceReport, report
from tests.benchmarks.disturbance.disturbance_rounds import DisturbedTurns, run_rounds
from tests.benchmarks.disturbance.disturbances import (
    DISTURBANCES,
    NO_STANDBY,
    NONE,
    PREPARING,
    STANDBY,
    Disturbance,
)
from tests.benchmarks.disturbance.neighbours import beside, busy_neighbours
from ullm.bench.stats import BenchRecord, summarise
from ullm.bench.workload import BenchRequest

LIMITS = Limits(bandwidth=1e9, arithmetic=1e12)
OURS = ServerCandidate("ullm default", ("ullm", "{port}"), "/live", "/ready", threads="--cpu-threads")
PEER = ServerCandidate("peer", ("peer", "{port}"), "/health", "/health", threads="-t")
BESIDE = Disturbance("1 neighbour", neighbours=1)


# --- control groups ----------------------------------------------------------------------------------------

V1 = "31 23 0:28 / {0} rw - tmpfs tmpfs rw\n32 31 0:29 / {0}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "41 31 0:38 / {0} rw,relatime - cgroup2 cgroup2 rw\n"


def write_mounts(folder: Path, text: str, controllers: str = "") -> Path:
    (folder / "cgroup.controllers").write_text(controllers)
    file = folder / "mountinfo"
    file.write_text(text.format(folder))
    return file


def names(folder: Path) -> list[str]:
    return os.listdir(folder)


def empty(folder: Path) -> None:
    """Do what a control group's rmdir does by itself."""
    for file in folder.iterdir():
        file.unlink()


def test_the_controller_is_found_in_either_version(tmp_path: Path) -> None:
    both = write_mounts(tmp_path, V2 + V1, "memory pids")
    assert find_controller(both) == CpuController(tmp_path / "cpu,cpuacct", 1)
    assert find_controller(write_mounts(tmp_path, V2, "cpuset cpu io")) == CpuController(tmp_path, 2)
    for mounts in (write_mounts(tmp_path, V2, "cpuset io"), tmp_path / "not Linux"):
        with pytest.raises(QuotaUnavailable, match="no cpu controller"):
            find_controller(mounts)


async def test_a_group_of_version_1(tmp_path: Path) -> None:
    async with quota_group(CpuController(tmp_path, 1), 1.5) as folder:
        assert (folder / "cpu.cfs_quota_us").read_text() == "150000"
        assert (folder / "cpu.cfs_period_us").read_text() == "100000"
        empty(folder)
    assert not names(tmp_path)


@pytest.mark.parametrize("enabled", ["", "cpu io"])
async def test_a_group_of_version_2(tmp_path: Path, enabled: str) -> None:
    control = tmp_path / "cgroup.subtree_control"
    control.write_text(enabled)
    async with quota_group(CpuController(tmp_path, 2), 0.5) as folder:
        assert (folder / "cpu.max").read_text() == "50000 100000"
        assert control.read_text() == (enabled or "+cpu")
        empty(folder)
    assert names(tmp_path) == [control.name]


async def test_a_group_is_removed_when_its_processes_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refusals = trio.Path.rmdir, iter([OSError("busy"), OSError("busy")])

    async def rmdir(path: trio.Path) -> None:
        if error := next(refusals, None):
            raise error
        await real(path)

    monkeypatch.setattr(trio.Path, "rmdir", rmdir)
    async with quota_group(CpuController(tmp_path, 1), 1.5) as folder:
        empty(folder)
    assert not names(tmp_path)

    monkeypatch.setattr(control_group, "REMOVE_SECONDS", 0.1)
    with pytest.raises(QuotaUnavailable, match="still has processes"):
        async with quota_group(CpuController(tmp_path, 1), 1.5):
            pass


def test_who_may_not_make_groups_is_told_why(tmp_path: Path) -> None:
    with pytest.raises(
        QuotaUnavailable, match=r"none/x cannot be made: No such file or directory; it takes root"
    ):
        CpuController(tmp_path / "none", 1).create("x", 1.0)
    with pytest.raises(QuotaUnavailable, match="it takes root"):  # there is no cgroup.subtree_control
        CpuController(tmp_path, 2).create("x", 1.0)
    assert not names(tmp_path)


@pytest.mark.process
async def test_a_command_enters_a_group_as_the_same_process(tmp_path: Path) -> None:
    command = [*enter(tmp_path), sys.executable, "-S", "-c", "import os; print(os.getpid())"]
    done = await trio.run_process(command, capture_stdout=True)
    assert (tmp_path / "cgroup.procs").read_text() == done.stdout.decode()


# --- disturbances ------------------------------------------------------------------------------------------


async def arguments(disturbance: Disturbance, candidate: ServerCandidate) -> tuple[str, ...]:
    async with disturbance.around(candidate) as disturbed:
        assert disturbed.start_seconds > candidate.start_seconds
        return disturbed.arguments


async def test_how_servers_are_disturbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disturbances, "usable_cores", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    monkeypatch.setattr(disturbances, "find_controller", lambda: CpuController(tmp_path, 1))
    by_name = {each.name: each for each in DISTURBANCES}
    assert await arguments(by_name["one core"], PEER) == ("taskset", "--cpu-list", "3", "peer", "{port}")
    assert await arguments(by_name["2 threads per core"], PEER) == ("peer", "{port}", "-t", "4")
    assert (await arguments(by_name["4 threads per core"], OURS))[-2:] == ("--cpu-threads", "8")
    assert (await arguments(STANDBY, OURS))[-2:] == ("--standby-workers", "1")
    assert await arguments(by_name["2 neighbours"], PEER) == PEER.arguments
    async with by_name["quota 0.5"].around(PEER) as disturbed:
        (name,) = names(tmp_path)
        assert disturbed.arguments == (*enter(tmp_path / name), "peer", "{port}")
        empty(tmp_path / name)


def test_who_is_disturbed_how(tmp_path: Path) -> None:
    threadless = transformers_candidate("python", tmp_path)
    for disturbance in DISTURBANCES:
        assert disturbance.applies_to(OURS)
        assert disturbance.applies_to(PEER) == (not disturbance.options)
        assert disturbance.applies_to(threadless) == (disturbance.threads == 0 and not disturbance.options)


@pytest.mark.parametrize(
    ("disturbance", "processors"),
    [
        (NONE, 2.0),
        (Disturbance("", neighbours=1), 1.0),
        (Disturbance("", neighbours=4), 0.4),
        (Disturbance("", one_core=True), 1.0),
        (Disturbance("", quota=1.5), 1.5),
        (Disturbance("", quota=4.0), 2.0),
        (Disturbance("", threads=4), 2.0),
    ],
)
def test_the_fair_share_of_two_cores(disturbance: Disturbance, processors: float) -> None:
    assert disturbance.fair_share(2) == processors


def test_what_a_machine_cannot_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_controller() -> CpuController:
        raise QuotaUnavailable("no cpu controller")

    monkeypatch.setattr(disturbances, "find_controller", no_controller)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = {each.name: each.missing() for each in DISTURBANCES if each.missing()}
    assert missing == {
        "one core": "there is no taskset",
        "quota 1.5": "no cpu controller",
        "quota 0.5": "no cpu controller",
    }


def test_what_is_needed_beside_a_disturbance_is_measured_too() -> None:
    assert choose_disturbances(["1 neighbour"]) == [NONE, BESIDE]
    assert choose_disturbances([PREPARING.name]) == [NONE, NO_STANDBY, PREPARING]
    assert choose_disturbances(None) == list(DISTURBANCES)


def wait_until_busy(pids: list[int]) -> None:
    while min(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids) < 0.2:
        time.sleep(0.02)


@pytest.mark.process
async def test_neighbours_are_busy_and_end() -> None:
    async with busy_neighbours(2) as pids:
        assert [psutil.Process(pid).is_running() for pid in pids] == [True, True]
        if sys.platform != "win32":
            assert len({os.getsid(pid) for pid in (0, *pids)}) == 3
        with trio.fail_after(20):
            await trio.to_thread.run_sync(wait_until_busy, pids, abandon_on_cancel=True)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.process
async def test_work_is_done_beside_neighbours() -> None:
    async def children(pid: int) -> int:
        return len(psutil.Process(pid).children())

    others = await children(os.getpid())
    assert await beside(2, children, os.getpid()) == others + 2
    assert await children(os.getpid()) == others


# --- measuring ---------------------------------------------------------------------------------------------


class ScriptedTarget:
    """Answers with a first token after a second, then one per second."""

    name = "scripted"

    def __init__(self, error: str | None = None) -> None:
        self.error = error

    async def run(self, request: BenchRequest, record: BenchRecord) -> None:
        record.error = self.error
        for _ in range(request.max_tokens):
            await trio.sleep(1)
            record.arrivals.append(trio.current_time())
        record.tokens = request.max_tokens


def probe(seconds: float, good: bool = True) -> Callable[[], Awaitable[bool]]:
    async def ask() -> bool:
        await trio.sleep(seconds)
        return good

    return ask


async def spend_half_a_processor() -> Spent:
    return Spent(trio.current_time() / 2, trio.current_time() / 4)


async def test_a_level_is_measured(autojump_clock: trio.testing.MockClock) -> None:
    load, prober = DisturbanceLoad((4,), output_tokens=4, seconds=9.0), Prober(probe(0.025))
    found = await run_level(ScriptedTarget(), load, 4, spend_half_a_processor, prober)
    assert found == pytest.approx(
        {
            (metrics := LevelMetrics.of(4)).rate: 4.0,
            metrics.first: 1000.0,
            metrics.probe: 25.0,
            metrics.probe_p99: 25.0,
            metrics.seconds: 6.0,  # for 12 s, since what began at 8 s is finished
            metrics.processors: 0.5,
            metrics.efficiency: 8.0,
            metrics.others: 0.25,
        }
    )
    assert len(prober.times) == pytest.approx(120, abs=1)


async def test_what_fails_has_no_figures(autojump_clock: trio.testing.MockClock) -> None:
    load = DisturbanceLoad((1,), output_tokens=2)
    with pytest.raises(RequestsFailed, match="it broke"):
        await run_level(ScriptedTarget("it broke"), load, 1, spend_half_a_processor, Prober(probe(0)))
    with pytest.raises(RequestsFailed, match=r"\d+ of \d+ probes of /health"):
        await run_level(ScriptedTarget(), load, 1, spend_half_a_processor, Prober(probe(0, False)))


async def test_a_server_may_finish_what_it_does_first(autojump_clock: trio.testing.MockClock) -> None:
    begin = trio.current_time()

    async def spent_until(busy: float) -> float:
        return min(trio.current_time() - begin, busy)

    await wait_until_quiet(lambda: spent_until(7.0))
    assert trio.current_time() - begin == 10.0
    await wait_until_quiet(lambda: spent_until(1e9))
    assert trio.current_time() - begin == 10.0 + disturbance_load.QUIET_LIMIT


def test_probes_are_summarised() -> None:
    records = [BenchRecord(0.0, [0.5, 1.0, 2.0], 2.0, tokens=3, prompt_tokens=5)]
    metrics = LevelMetrics.of(1)
    found = metrics.figures(summarise(records, 1), Spent(1.5, -0.1), [0.001 * n for n in range(100, 0, -1)])
    assert (found[metrics.probe], found[metrics.probe_p99]) == (50.0, 99.0)
    assert found[metrics.others] == 0.0  # clock ticks
    assert (found[metrics.first], found[metrics.processors], found[metrics.efficiency]) == (500.0, 0.75, 2.0)


async def test_rounds_rotate_and_failures_stay_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def measure(candidate: ServerCandidate, disturbance: Disturbance, *rest: Any) -> Figures:
        if (candidate, disturbance) == (PEER, BESIDE):
            raise RequestsFailed(["it fell over"])
        return figures(1, 10, 1)

    monkeypatch.setattr(disturbance_rounds, "measure_disturbed", measure)
    monkeypatch.setattr(disturbance_rounds, "SETTLE", 0.0)
    monkeypatch.setattr(Disturbance, "missing", lambda self: "needs root" if self.quota else "")
    said: list[str] = []
    chosen = [NONE, BESIDE, Disturbance("quota 1", quota=1.0), STANDBY]
    load = DisturbanceLoad((1,))
    found = await run_rounds([OURS, PEER], chosen, load, 2, tmp_path, said.append, lambda: LIMITS)
    assert [line.split(":")[1:3] for line in said] == [
        *([" undisturbed", " ullm default"], [" undisturbed", " peer"]),
        *([" 1 neighbour", " ullm default"], [" 1 neighbour", " peer"]),
        [" a prepared standby worker", " ullm default"],
        *([" 1 neighbour", " peer"], [" 1 neighbour", " ullm default"]),
        [" a prepared standby worker", " ullm default"],
        *([" undisturbed", " peer"], [" undisturbed", " ullm default"]),
    ]
    assert found.left_out == {"quota 1": "needs root"}
    assert [turn.error for turn in found.turns[BESIDE.name] if turn.candidate == "peer"] == [
        "requests failed: it fell over"
    ] * 2
    assert len(found.all()) == 10


async def test_a_server_that_cannot_have_more_threads_is_named(tmp_path: Path) -> None:
    threads, candidate = Disturbance("2 threads per core", threads=2), replace(PEER, threads="")
    found = await run_rounds(
        [candidate], [threads], DisturbanceLoad((1,)), 1, tmp_path, lambda line: None, lambda: LIMITS
    )
    assert found.left_out == {"2 threads per core: peer": "it has no option for the number of threads"}
    assert not found.all()


@pytest.mark.slow
@pytest.mark.process
async def test_a_server_is_measured_beside_a_neighbour_and_on_one_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disturbance_load, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(comparison_rounds, "SETTLE", 0.0)
    peer = ServerCandidate("peer", (sys.executable, str(SCRIPT), "{port}"), "/health", "/health")
    disturbance = Disturbance("both", neighbours=1, one_core=True)
    load = DisturbanceLoad((1, 3), output_tokens=4, seconds=0.3)
    before = {child.pid for child in psutil.Process().children()}  # of other tests, such as Python's tracker
    found = await disturbance_rounds.measure_disturbed(peer, disturbance, load, tmp_path / "log")
    assert len(found.values) == 16
    assert all(value > 0 for metric, value in found.values.items() if "others" not in metric.name)
    assert all(found.values[LevelMetrics.of(level).processors] < 1 for level in (1, 3))
    assert {child.pid for child in psutil.Process().children()} <= before


@pytest.mark.process
async def test_the_time_of_others_is_not_that_of_neighbours() -> None:
    async with busy_neighbours(1) as (pid,):
        began = time.monotonic()
        before = look(pid)
        await trio.to_thread.run_sync(wait_until_busy, [pid])
        after = look(pid)
    there_is = psutil.cpu_count() * (time.monotonic() - began)
    server = after.server - before.server
    assert server > 0.1
    assert -0.1 < after.others - before.others < there_is - server + 0.1


# --- judging -----------------------------------------------------------------------------------------------


def figures(level: int, rate: float, processors: float, others: float = 0.0) -> Figures:
    m = LevelMetrics.of(level)
    times = {m.first: 40.0, m.probe: 2.0, m.probe_p99: 9.0, m.seconds: 100 * processors / rate}
    return Figures(
        {m.rate: rate, **times, m.processors: processors, m.efficiency: rate / processors, m.others: others},
        {},
    )


def judged(*, ours_beside: float = 60.0, others: float = 0.0, error: str = "") -> DisturbanceReport:
    """Two rounds on a machine that is twice as fast in the second; beside a neighbour half of the time."""
    turns = DisturbedTurns({NONE.name: [], BESIDE.name: []}, {"quota 1.5": "it takes root"})
    for number, speed in enumerate((1, 2)):
        for name, server, rate, processors in (
            (NONE.name, OURS.name, 100.0, 1.8),
            (NONE.name, PEER.name, 50.0, 2.0),
            (BESIDE.name, OURS.name, ours_beside, 0.9),
            (BESIDE.name, PEER.name, 10.0, 1.0),
        ):
            turn = Turn(number, server, figures(4, speed * rate, processors, others), LIMITS)
            turns.turns[name].append(turn)
    if error:
        turns.turns[NONE.name].append(Turn(1, "other", None, LIMITS, error))
    load = DisturbanceLoad((4,), output_tokens=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disturbance_report, "machine", lambda: {**machine(), "cores": 2})
        return report([OURS, PEER], [NONE, BESIDE], turns, load, "w.gguf", PEER.name)


def test_what_is_kept_is_measured_by_the_processor_time_that_was_given() -> None:
    undisturbed, peer, beside, beside_peer = judged().rows
    assert (beside.disturbance, beside.server, beside.streams) == ("1 neighbour", "ullm default", 4)
    assert beside.tokens_per_second == 90.0  # the median of both rounds
    assert beside.rate_share is not None
    assert beside.rate_share.median == pytest.approx(0.6)
    assert beside.processors_share is not None
    assert beside.processors_share.median == pytest.approx(0.5)
    assert beside.kept is not None
    assert (beside.kept.min, beside.kept.max) == pytest.approx((1.2, 1.2))  # 0.6 / 0.5
    assert beside.fair_share == 1.0
    assert beside.kept_of_fair is not None
    assert beside.kept_of_fair.median == pytest.approx(1.2)
    assert beside.against is not None
    assert beside.against.median == pytest.approx(6.0)
    assert beside_peer.kept is not None
    assert beside_peer.kept.median == pytest.approx(0.4)  # 0.2 / 0.5
    assert (undisturbed.kept, peer.against, beside_peer.against) == (None, None, None)


def test_the_verdict_is_about_ullm() -> None:
    good = judged()
    assert good.good
    assert "ullm keeps 80% everywhere and is nowhere behind peer." in good.markdown()
    bad = judged(ours_beside=9.0)
    assert bad.failures == [
        "1 neighbour: ullm default, 4 streams: keeps 0.18 of its throughput by time",
        "1 neighbour: ullm default, 4 streams: keeps 0.18 of its throughput by fair share",
        "1 neighbour: ullm default, 4 streams: 0.90 × peer",
    ]
    assert not bad.good
    assert "- **1 neighbour: ullm default, 4 streams: 0.90 × peer**" in bad.markdown()
    assert not judged(error="it fell over").good


def test_reports_for_people_and_for_programs() -> None:
    found = judged(error="it fell over")
    text = found.markdown()
    assert "| 4 streams | tok/s | processor time, s | processors | fair share | kept by time |" in text
    assert (
        "| 1 neighbour: ullm default | 90 (60%) | 1.12 | 0.90 (50%) | 1.00 | 1.20 (1.20–1.20) "
        "| 1.20 (1.20–1.20) | 40 | 2.00 | 9.00 | 0.00 | 6.00 (6.00–6.00) |"
    ) in text
    assert "not quiet" not in text
    says = "in 4 of 4 rows other programs or virtual machines used more than 0.1 processors"
    assert says in judged(others=0.2).markdown()
    assert "Left out: quota 1.5: it takes root." in text
    assert "Not measured: undisturbed: other, round 2: it fell over" in text
    assert "- peer: `peer {port}`" in text
    content = json.loads(found.json())
    assert content["rows"][2]["kept"] == pytest.approx({"median": 1.2, "min": 1.2, "max": 1.2})
    assert content["left_out"] == {"quota 1.5": "it takes root"}


@pytest.mark.parametrize(("with_standby", "good"), [(49.0, True), (46.0, False)])
def test_a_standby_worker_that_waits_costs_nothing(with_standby: float, good: bool) -> None:
    turns = DisturbedTurns(
        {
            NONE.name: [Turn(0, OURS.name, figures(1, 60, 1.2), LIMITS)],
            NO_STANDBY.name: [Turn(0, OURS.name, figures(1, 50, 1.0), LIMITS)],
            STANDBY.name: [Turn(0, OURS.name, figures(1, with_standby, 1.0), LIMITS)],
        }
    )
    found = report([OURS], [NONE, NO_STANDBY, STANDBY], turns, DisturbanceLoad((1,)), "w.gguf", OURS.name)
    shares = [row.rate_share.median for row in found.rows if row.rate_share is not None]
    assert shares == pytest.approx([50 / 60, with_standby / 50])
    assert found.good == good
    says = "a prepared standby worker: ullm default, 1 stream: 0.92 × its throughput without"
    assert (says in found.failures) != good
    assert "nowhere behind" not in found.markdown()
