"""Costs that must stay flat: what counts as growth, and a short run of the real thing."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.benchmarks.soak.judge import MIB, Finding, Tolerance, TooShort, ends, judge, readings
from tests.benchmarks.soak.mix import WEIGHTS, Mix, SoakRequest, Unexpected, run_request
from tests.benchmarks.soak.sample import ProcessUsage, Sample, yardstick
from tests.benchmarks.soak.soak_command import check, publish, with_model
from tests.benchmarks.soak.soak_plot import draw
from tests.benchmarks.soak.soak_report import SoakReport, split
from tests.benchmarks.soak.soak_run import SoakPlan, condense, run_soak
from ullm.bench.workload import Length
from ullm.client.http import Connection, Endpoint
from ullm.errors import UsageError

DEFAULT = Tolerance()


def samples(
    *,
    count: int = 40,
    front_growth: float = 0.0,
    leak: int = 0,
    files: float = 0.0,
    slower: float = 0.0,
    pace: float = 0.0,
) -> list[Sample]:
    """Of a server that makes 500 steps in 10 seconds, at 2 ms each in the front end.

    Args:
        front_growth: of its time per step, from the first to the last sample, as a share.
        leak: bytes of the front end per sample.
        files: descriptors per sample.
        slower: as front_growth, of all work on the machine.
        pace: how much fewer steps it makes at the end, as a share.
    """
    found, front, worker, steps = [], 0.0, 0.0, 0.0
    for number in range(count):
        part = number / count
        made = 500 * (1 - pace * part)
        steps += made
        front += made * 0.002 * (1 + front_growth * part) * (1 + slower * part)
        worker += made * 0.001 * (1 + slower * part)
        ends_taken = ProcessUsage(
            front, 60 * MIB + leak * number, 70 * MIB + leak * number, 20 + int(files * number)
        )
        found.append(
            Sample(
                seconds=10.0 * number,
                requests=200 * number,
                steps=steps,
                tokens=16 * steps,
                restarts=0,
                yardstick=0.004 * (1 + slower * part),
                front=ends_taken,
                worker=ProcessUsage(worker, 20 * MIB, 30 * MIB, 10),
                standby=ProcessUsage(0.0, 5 * MIB, 30 * MIB, 9),
                worker_pids=[7],
            )
        )
    return found


def grown(found: list[Sample], tolerance: Tolerance = DEFAULT) -> set[str]:
    return {each.name for each in findings(found, tolerance) if not each.good}


def findings(found: list[Sample], tolerance: Tolerance = DEFAULT) -> list[Finding]:
    return judge(*ends(readings(found), 0.1), tolerance)


# --- what counts as growth -----------------------------------------------------------------------------


def test_flat_costs() -> None:
    assert grown(samples()) == set()
    by_name = {each.name: each for each in findings(samples())}
    assert by_name["processor time per step, front end"].first == pytest.approx(2.0)
    assert by_name["steps"].last == pytest.approx(50)
    assert by_name["memory of the tree (PSS)"].last == pytest.approx(85)
    assert by_name["open descriptors"].first == 39


def test_each_cost_that_grows_is_found() -> None:
    assert grown(samples(front_growth=0.1)) == {"processor time per step, front end"}
    assert grown(samples(leak=MIB // 2)) == {
        "memory of the tree (PSS)",
        "memory of the front end (RSS)",
    }
    assert grown(samples(files=0.5)) == {"open descriptors"}
    assert grown(samples(pace=0.2)) == {"steps", "tokens"}


def test_a_machine_that_becomes_slower_is_not_growth() -> None:
    found = samples(slower=0.3)
    time = next(each for each in findings(found) if each.name == "processor time per step, worker")
    assert time.change > 0.2
    assert time.beside == pytest.approx(0, abs=0.02)
    assert grown(found) == set()
    assert grown(samples(slower=0.3, front_growth=0.15)) == {"processor time per step, front end"}


def test_tolerances() -> None:
    assert grown(samples(front_growth=0.1), Tolerance(time=0.2)) == set()
    assert grown(samples(leak=MIB // 2), Tolerance(slack=30)) == set()
    assert grown(samples(pace=0.2), Tolerance(rate=0.3)) == set()


def test_intervals_that_tell_nothing_are_left_out() -> None:
    found = samples(count=10)
    other = msgspec_replace(found[5], worker_pids=[8])
    idle = msgspec_replace(found[8], steps=found[7].steps)
    kept = readings([*found[:5], other, *found[6:8], idle, found[9]])
    assert [reading.seconds for reading in kept] == [10, 20, 30, 40, 70, 90]


def msgspec_replace(sample: Sample, **changes: object) -> Sample:
    fields = {name: getattr(sample, name) for name in sample.__struct_fields__}
    return Sample(**{**fields, **changes})


def test_too_few_readings() -> None:
    with pytest.raises(TooShort, match="5 readings"):
        ends(readings(samples(count=6)), 0.0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SoakPlan("m", streams=0), "--streams must be above 0"),
        (SoakPlan("m", warm_up=1.0), "--warm-up"),
        (SoakPlan("m", seconds=60), "--interval 10 is too long for --seconds 60"),
    ],
)
def test_plans_that_cannot_be(plan: SoakPlan, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(plan)


# --- what is shown -------------------------------------------------------------------------------------


def soak(found: list[Sample], complaints: list[str] | None = None) -> SoakReport:
    counts = Counter(answered=100, refused=3)
    return condense(SoakPlan("m"), ["python", "-m", "ullm"], counts, found, complaints or [])


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = soak(samples(front_growth=0.2))
    assert not found.good
    publish(found, tmp_path, "svg")
    text = (tmp_path / "soak.md").read_text("utf-8")
    assert capsys.readouterr().out == text
    assert "| processor time per step, front end, ms | 2." in text
    assert "**worse**" in text
    assert "100 answered, 3 refused" in text
    assert len(json.loads((tmp_path / "soak.json").read_text("utf-8"))["samples"]) == 40
    assert b"processor ms per step" in (tmp_path / "soak.svg").read_bytes()


def test_what_makes_a_run_bad() -> None:
    assert soak(samples()).good
    assert not soak(samples(), ["x: it fell over"]).good
    restarted = [msgspec_replace(each, restarts=float(each.seconds > 200)) for each in samples()]
    assert soak(restarted).complaints == ["1 workers were restarted"]


def test_the_course_has_at_most_as_many_rows_as_readings() -> None:
    found = readings(samples(count=25))
    assert [len(part) for part in split(found, 10)] == [2, 3, 2, 3, 2, 2, 3, 2, 3, 2]
    assert split(found[:2], 10) == [found[:1], found[1:2]]


def test_a_plot_of_few_readings(tmp_path: Path) -> None:
    draw(soak(samples(count=12)), tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_the_yardstick_takes_a_moment() -> None:
    assert 0 < yardstick() < 1


# --- what is asked -------------------------------------------------------------------------------------


def test_the_mix_is_the_same_for_the_same_seed() -> None:
    def first(mix: Mix, client: int) -> list[SoakRequest]:
        return list(itertools.islice(mix.requests(client), 300))

    mix = Mix("m", Length(3, 5), Length(2, 4))
    assert first(mix, 1) == first(mix, 1)
    assert first(mix, 1) != first(mix, 2)
    assert first(mix, 1) != first(dataclasses.replace(mix, seed=1), 1)
    assert {request.kind for request in first(mix, 1)} == set(WEIGHTS)
    assert {request.choices for request in first(mix, 1)} == {1, 2}
    assert {request.body["max_tokens"] for request in first(mix, 1)} == {-1, 2, 3, 4}


@pytest.mark.slow
@pytest.mark.process
async def test_a_run_that_stays_flat(tmp_path: Path) -> None:
    plan = SoakPlan(
        "scripted",
        ("--standby-workers", "0"),
        streams=6,
        seconds=4,
        interval=0.3,
        requests=20,
        output_tokens=Length(4, 12),
    )
    tolerance = Tolerance(rate=0.99, time=4.0, memory=0.3, slack=20)
    plan = dataclasses.replace(with_model(plan, tmp_path / "model", 0.005), tolerance=tolerance)
    said: list[str] = []
    with trio.fail_after(60):
        found = await run_soak(plan, tmp_path / "log", said.append)
    assert found.complaints == []
    worse = [finding for finding in found.findings if not finding.good]
    assert worse == []
    assert found.counts["answered"] >= 20
    assert set(found.counts) == {"answered", "left", "refused"}
    assert found.samples[-1].worker.cpu > 0
    assert len(said) > 3


@pytest.mark.slow
@pytest.mark.process
async def test_a_run_whose_workers_die_is_not_good(tmp_path: Path) -> None:
    faults = ("--faults", "worker.step:crash@nth=100,times=1")
    plan = SoakPlan("scripted", faults, streams=2, seconds=5, interval=0.2, output_tokens=Length(4, 12))
    plan = with_model(plan, tmp_path / "model", 0.005)
    with trio.fail_after(60):
        found = await run_soak(plan, tmp_path / "log", lambda line: None)
    assert found.complaints == ["1 workers were restarted"]
    assert not found.good


async def test_a_request_that_ends_otherwise_than_it_must(nursery: trio.Nursery) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(answer)

    listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
    port = listeners[0].socket.getsockname()[1]
    connection = Connection(Endpoint("http", "127.0.0.1", port, ""))
    request = SoakRequest("completion, whole", "/completions", {"stream": False})
    with pytest.raises(Unexpected, match="0 of 1 choices ended"):
        await run_request(connection, request)
    await connection.aclose()
    nursery.cancel_scope.cancel()
