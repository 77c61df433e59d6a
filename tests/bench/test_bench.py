"""Workloads, statistics, the load loop on a virtual clock, and reports."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import msgspec
import pytest
import trio
from rich.console import Console

from ullm.bench.bench_report import COLUMNS, BenchReport
from ullm.bench.load import measure
from ullm.bench.stats import BenchRecord, Distribution, percentile, summarise
from ullm.bench.workload import BenchRequest, Length, Workload
from ullm.cli import bench as command
from ullm.cli.options import LoadOptions
from ullm.errors import UsageError


def test_workload_is_reproducible_and_streams_differ() -> None:
    workload = Workload(Length(5, 9), Length(1, 4), seed=3)
    first = list(islice(workload.requests(), 20))
    assert first == list(islice(workload.requests(), 20))
    assert first != list(islice(workload.requests(1), 20))
    assert first != list(islice(Workload(Length(5, 9), Length(1, 4), seed=4).requests(), 20))
    assert {len(request.prompt.split()) for request in first} == {5, 6, 7, 8, 9}
    assert {request.max_tokens for request in first} == {1, 2, 3, 4}
    assert len({request.prompt for request in first}) == 20


def test_shared_prefix() -> None:
    workload = Workload(Length(3, 3), shared_prefix=10)
    prompts = [
        request.prompt.split() for stream in (0, 1) for request in islice(workload.requests(stream), 3)
    ]
    assert {tuple(words[:10]) for words in prompts} == {tuple(prompts[0][:10])}
    assert {len(words) for words in prompts} == {13}


@pytest.mark.parametrize("text", ["", "x", "0", "5-3", "-3", "1-2-3"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(UsageError, match="--x"):
        Length.parse(text, "--x")


def test_good_lengths() -> None:
    assert Length.parse("128", "--x") == Length(128, 128)
    assert str(Length.parse("100-1024", "--x")) == "100-1024"


@pytest.mark.parametrize("text", ["", "0", "1,,2", "a", "1,-2"])
def test_bad_concurrency(text: str) -> None:
    with pytest.raises(UsageError, match=f"--concurrency {text}: expected numbers above 0"):
        command.parse_load(LoadOptions(concurrency=[text]))


def test_a_load_from_options() -> None:
    plan = command.parse_load(
        LoadOptions(prompt_words="32", output_tokens="1-8", shared_prefix=3, seed=7, requests=9)
    )
    assert plan.workload == Workload(Length(32, 32), Length(1, 8), 3, 7)
    assert (plan.levels, plan.requests) == (command.DEFAULT_LEVELS, 9)
    assert command.parse_load(LoadOptions(concurrency=["1,4", "16"])).levels == [1, 4, 16]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (LoadOptions(shared_prefix=-1), "--shared-prefix"),
        (LoadOptions(requests=0), "--requests"),
        (LoadOptions(temperature=-1.0), "--temperature"),
        (LoadOptions(top_p=0.0), "--top-p"),
    ],
)
def test_loads_that_cannot_be(options: LoadOptions, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        command.parse_load(options)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50.0, 90.0, 99.0, 100.0]
    assert percentile([7.0], 0.01) == 7.0
    assert Distribution.of([]) is None
    assert Distribution.of([3.0, 1.0, 2.0]) == Distribution(mean=2.0, p50=2.0, p90=3.0, p99=3.0, max=3.0)


def test_summary() -> None:
    good = BenchRecord(
        started=0.0, arrivals=[1.0, 1.5, 2.5], finished=3.0, tokens=4, prompt_tokens=9, finish_reason="length"
    )
    bad = BenchRecord(started=1.0, arrivals=[1.1], finished=5.0, error="it broke")
    silent = BenchRecord(started=1.0, finished=2.0)
    summary = summarise([good, bad, silent], 2)
    assert (summary.requests, summary.failed, summary.concurrency) == (3, 2, 2)
    assert (summary.seconds, summary.output_tokens, summary.prompt_tokens) == (5.0, 4, 9)
    assert summary.tokens_per_second == 0.8
    assert summary.time_to_first_token is not None
    assert summary.time_to_first_token.p50 == 1.0
    assert summary.inter_token is not None
    assert (summary.inter_token.p50, summary.inter_token.max) == (0.5, 1.0)
    assert summary.time_per_token is not None
    assert summary.time_per_token.mean == 0.5
    assert summary.finish_reasons == {"length": 1}
    assert summary.errors == ["it broke", "no token came"]
    assert summarise([], 1).tokens_per_second == 0.0


class Steady:
    """First token after one second, then one each half second; counts how many run at once."""

    name = "steady"

    def __init__(self) -> None:
        self.running = self.most = 0
        self.asked: list[BenchRequest] = []

    async def run(self, request: BenchRequest, record: BenchRecord) -> None:
        self.asked.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        await trio.sleep(0.5)
        for _ in range(request.max_tokens):
            await trio.sleep(0.5)
            record.arrivals.append(trio.current_time())
        record.tokens = request.max_tokens
        self.running -= 1


@pytest.mark.parametrize(("seconds", "requests"), [(0.0, 3), (2.5, 3), (2.6, 6), (1e9, 7)])
async def test_a_closed_loop_that_ends_by_time(
    seconds: float, requests: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Each of three clients sends one request of 2.5 seconds, and another one while there is time."""
    summary, _ = await measure(Steady(), Workload(output_tokens=Length(4, 4)), 3, 7, seconds=seconds)
    assert (summary.requests, summary.failed) == (requests, 0)


async def test_closed_loop(autojump_clock: trio.testing.MockClock) -> None:
    target = Steady()
    summary, records = await measure(target, Workload(output_tokens=Length(4, 4)), 3, 7)
    assert target.most == 3
    assert len(records) == len({request.prompt for request in target.asked}) == 7
    # Seven requests of 2.5 s on three clients take three rounds.
    assert summary.seconds == pytest.approx(7.5)
    assert summary.tokens_per_second == pytest.approx(28 / 7.5)
    assert summary.time_to_first_token is not None
    assert summary.time_to_first_token.max == pytest.approx(1.0)
    assert summary.inter_token is not None
    assert summary.inter_token.p99 == pytest.approx(0.5)


async def test_levels_are_warmed_up_and_never_repeat_a_prompt(autojump_clock: trio.testing.MockClock) -> None:
    target = Steady()
    console = Console(file=io.StringIO())
    summaries = await command.run_levels(target, command.BenchPlan(Workload(), [1, 6]), console)
    assert [(s.concurrency, s.requests) for s in summaries] == [(1, 4), (6, 6)]
    assert len(target.asked) == len({request.prompt for request in target.asked}) == 1 + 4 + 6
    assert target.asked[0].max_tokens == command.WARM_UP.low


@pytest.fixture
def report() -> BenchReport:
    record = BenchRecord(started=0.0, arrivals=[0.1, 0.2], finished=0.3, tokens=2)
    failed = BenchRecord(started=0.0, finished=0.3, error="server said [no]")
    return BenchReport.of("http://x", "m", Workload(), [summarise([record, failed], 1)])


def test_json_report_can_be_read_back(report: BenchReport) -> None:
    assert msgspec.json.decode(report.json(), type=BenchReport) == report
    assert json.loads(report.json())["runs"][0]["errors"] == ["server said [no]"]


def test_markdown_report(report: BenchReport) -> None:
    head, line, row = report.markdown().strip().splitlines()
    assert head.count("|") == line.count("|") == row.count("|") == len(COLUMNS) + 1
    assert "100" in row


def test_terminal_report(report: BenchReport) -> None:
    out = io.StringIO()
    report.show(Console(file=out, width=90))
    assert "failed: server said [no]" in out.getvalue()
    assert "…" not in out.getvalue()


@pytest.mark.parametrize("suffix", [".json", ".md"])
def test_publish(
    report: BenchReport, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path = tmp_path / f"report{suffix}"
    assert command.publish(report, path, as_json=True) == 1  # one request failed
    assert json.loads(capsys.readouterr().out)["target"] == "http://x"
    assert path.read_text().startswith("|" if suffix == ".md" else "{")
