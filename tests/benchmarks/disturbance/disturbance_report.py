"""What disturbances cost, as Markdown and JSON, and the verdict.

A server that is given less processor time computes less. It keeps all that it can if it generates as many
tokens per processor second as undisturbed: throughput / (undisturbed throughput × share of the undisturbed
processor time) is the ratio of the two, within a round. That alone would not tell a server that does not take
what it is given, because it waits or because its threads share a core, so that throughput / (undisturbed
throughput × fair share of the cores) is beside it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from tests.benchmarks.compare.candidates import ServerCandidate
from tests.benchmarks.compare.comparison import Entry, Ratio, line_of, shown
from tests.benchmarks.compare.comparison_rounds import Turn
from tests.benchmarks.compare.hardware import Limits, describe, machine, median_limits
from tests.benchmarks.compare.scenarios import Metric
from tests.benchmarks.disturbance.disturbance_load import DisturbanceLoad, LevelMetrics
from tests.benchmarks.disturbance.disturbance_rounds import DisturbedTurns
from tests.benchmarks.disturbance.disturbances import NO_STANDBY, STANDBY, Disturbance
from tests.benchmarks.soak.soak_report import table

LEAST_KEPT = 0.80
"""Share of its throughput by the processor time that it is given, or its fair share, that ullm must keep."""
LEAST_BESIDE_STANDBY = 0.95
"""Share of its throughput that a server must keep beside a standby worker that waits; the rest is noise."""
QUIET = 0.1
"""Processors that others may use before the report says so."""
COLUMNS = (
    "tok/s",
    "processor time, s",
    "processors",
    "fair share",
    "kept by time",
    "kept by share",
    "first token, ms",
    "/health, ms",
    "p99",
    "others",
)


class DisturbedRow(msgspec.Struct, frozen=True):
    """One server with a number of streams under one disturbance; medians over the rounds.

    Args:
        first_token, probe, probe_p99: milliseconds.
        processor_seconds: processor seconds that the server's processes used.
        processors: the same, per second.
        rate_share, processors_share: ratios to the undisturbed server's in the same round.
        fair_share: processors that it should be given at least.
        kept: ratio to the undisturbed server's tokens per processor second.
        kept_of_fair: ratio to the undisturbed server's throughput by the fair share of the cores.
        others: processors that everybody else used, besides the neighbours and the client.
        against: ratio of its tokens per second to the baseline's under the same disturbance.
    """

    disturbance: str
    server: str
    streams: int
    tokens_per_second: float
    first_token: float
    probe: float
    probe_p99: float
    processor_seconds: float
    processors: float
    rate_share: Ratio | None
    processors_share: Ratio | None
    fair_share: float
    kept: Ratio | None
    kept_of_fair: Ratio | None
    others: float
    against: Ratio | None

    @property
    def title(self) -> str:
        """Its name in tables and verdicts."""
        return f"{self.disturbance}: {self.server}"

    def cells(self) -> list[str]:
        """Return the cells of `COLUMNS`, and the ratio to the baseline."""
        return [
            self.title,
            shown(self.tokens_per_second) + _percent(self.rate_share),
            shown(self.processor_seconds),
            f"{self.processors:.2f}{_percent(self.processors_share)}",
            f"{self.fair_share:.2f}",
            _ratio(self.kept),
            _ratio(self.kept_of_fair),
            *(shown(value) for value in (self.first_token, self.probe, self.probe_p99)),
            f"{self.others:.2f}",
            _ratio(self.against),
        ]


class DisturbanceReport(msgspec.Struct, frozen=True):
    """A finished benchmark.

    Args:
        commands: server → its command.
        left_out: disturbances that the machine or a server cannot do, and why.
        failures: what ullm does worse than it must.
        errors: turns that were not measured, and why.
    """

    when: str
    machine: dict[str, Any]
    limits: Limits
    model: str
    baseline: str
    rounds: int
    output_tokens: int
    seconds: float
    commands: dict[str, list[str]]
    rows: list[DisturbedRow]
    left_out: dict[str, str]
    failures: list[str]
    errors: list[str]

    @property
    def good(self) -> bool:
        """True if all was measured, and ullm keeps what it must."""
        return not self.errors and not self.failures

    def json(self) -> str:
        """Return the whole report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def markdown(self) -> str:
        """Return a table for each number of streams, and the verdict."""
        parts = [self._heading()]
        for streams in dict.fromkeys(row.streams for row in self.rows):
            head = [f"{streams} stream{'s' if streams > 1 else ''}", *COLUMNS, f"against {self.baseline}"]
            parts.append(table([head, *(row.cells() for row in self.rows if row.streams == streams)]))
        parts += [self._verdict(), *self._noise()]
        parts.append("\n".join(f"- {name}: `{' '.join(command)}`" for name, command in self.commands.items()))
        parts += [f"Left out: {name}: {why}." for name, why in self.left_out.items()]
        parts += [f"Not measured: {error}" for error in self.errors]
        return "\n\n".join(parts) + "\n"

    def _heading(self) -> str:
        return (
            f"{self.when[:10]}, {describe(self.machine)}; {self.limits}. {self.model}. Medians of "
            f"{self.rounds} rounds, one server at a time, requests of {self.output_tokens} new tokens sent "
            f"for {self.seconds:g} s each, over HTTP with server-sent events; the client has the same cores, "
            "but neither quota nor affinity. "
            "Neighbours are spinning processes, each in a session of its own. *Processors*: processor "
            "seconds of all the server's processes per second; in brackets here and at tok/s the share of "
            "the undisturbed. *Kept by time*: throughput by the undisturbed throughput and the share of the "
            "undisturbed processor time; *kept by share*: by the undisturbed throughput and the fair share "
            "of the cores; round by round, median (least–most), for ullm at least "
            f"{LEAST_KEPT:.2f}. *Others*: processors of all other programs and virtual machines. Standby "
            f"workers are beside *{NO_STANDBY.name}*."
        )

    def _noise(self) -> list[str]:
        busy = [row for row in self.rows if row.others > QUIET]
        if not busy:
            return []
        most = max(busy, key=lambda row: row.others)
        return [
            f"**The machine was not quiet**: in {len(busy)} of {len(self.rows)} rows other programs or "
            f"virtual machines used more than {QUIET} processors, most in *{most.title}*: {most.others:.2f}."
        ]

    def _verdict(self) -> str:
        if not self.failures:
            behind = "" if self.baseline.startswith("ullm ") else f" and is nowhere behind {self.baseline}"
            return f"ullm keeps {LEAST_KEPT:.0%} everywhere{behind}."
        return "\n".join(f"- **{failure}**" for failure in self.failures)


def report(
    candidates: Sequence[ServerCandidate],
    disturbances: Sequence[Disturbance],
    finished: DisturbedTurns,
    load: DisturbanceLoad,
    model: str,
    baseline: str,
) -> DisturbanceReport:
    """Condense the turns, and judge ullm's.

    Args:
        model: name of the model in the report.
        baseline: server to compare the others with.
    """
    turns, hardware = finished.all(), machine()
    rows = [
        row
        for level in load.levels
        for row in rows_of(level, disturbances, finished.turns, baseline, hardware["cores"])
    ]
    ours = {each.name for each in candidates if not each.is_peer}
    return DisturbanceReport(
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=hardware,
        limits=median_limits([turn.limits for turn in turns]),
        model=model,
        baseline=baseline,
        rounds=1 + max((turn.round for turn in turns), default=-1),
        output_tokens=load.output_tokens,
        seconds=load.seconds,
        commands={each.name: list(each.arguments) for each in candidates},
        rows=rows,
        left_out=finished.left_out,
        failures=[failure for row in rows if row.server in ours for failure in failures_of(row, baseline)],
        errors=[
            f"{name}: {turn.candidate}, round {turn.round + 1}: {turn.error}"
            for name, those in finished.turns.items()
            for turn in those
            if turn.error
        ],
    )


def rows_of(
    level: int,
    disturbances: Sequence[Disturbance],
    turns: Mapping[str, Sequence[Turn]],
    baseline: str,
    cores: int,
) -> list[DisturbedRow]:
    """Return the rows of one number of streams: all disturbances, and for each all servers."""
    return [
        row_of(level, disturbance, server, turns, baseline, cores)
        for disturbance in disturbances
        for server in dict.fromkeys(t.candidate for t in turns.get(disturbance.name, ()) if t.figures)
    ]


def row_of(
    level: int,
    disturbance: Disturbance,
    server: str,
    turns: Mapping[str, Sequence[Turn]],
    baseline: str,
    cores: int,
) -> DisturbedRow:
    """Condense a server's turns under one disturbance, of which at least one has figures."""
    metrics = LevelMetrics.of(level)

    def entry(metric: Metric) -> Entry:
        return line_of(metric, turns[disturbance.name], baseline, None).entries[server]

    def beside(metric: Metric) -> Ratio | None:
        return ratio_beside(metric, turns, server, disturbance)

    fair, rate_share = disturbance.fair_share(cores), beside(metrics.rate)
    return DisturbedRow(
        disturbance=disturbance.name,
        server=server,
        streams=level,
        tokens_per_second=entry(metrics.rate).median,
        first_token=entry(metrics.first).median,
        probe=entry(metrics.probe).median,
        probe_p99=entry(metrics.probe_p99).median,
        processor_seconds=entry(metrics.seconds).median,
        processors=entry(metrics.processors).median,
        rate_share=rate_share,
        processors_share=beside(metrics.processors),
        fair_share=fair,
        kept=beside(metrics.efficiency),
        kept_of_fair=None if rate_share is None else _scaled(rate_share, cores / fair),
        others=entry(metrics.others).median,
        against=entry(metrics.rate).ratio,
    )


def ratio_beside(
    metric: Metric, turns: Mapping[str, Sequence[Turn]], server: str, disturbance: Disturbance
) -> Ratio | None:
    """Return a server's ratio to itself without the disturbance, over the rounds that have both."""
    own = [
        replace(turn, candidate=name)
        for name in (disturbance.name, disturbance.beside)
        for turn in turns.get(name, [])
        if turn.candidate == server
    ]
    return line_of(metric, own, disturbance.beside, None).entries[disturbance.name].ratio


def failures_of(row: DisturbedRow, baseline: str) -> list[str]:
    """Return what a row of ullm's does worse than it must."""
    streams = f"{row.title}, {row.streams} stream{'s' if row.streams > 1 else ''}"
    found = []
    if row.kept is not None and row.kept.median < LEAST_KEPT:
        found.append(f"{streams}: keeps {row.kept.median:.2f} of its throughput by time")
    if row.kept_of_fair is not None and row.kept_of_fair.median < LEAST_KEPT:
        found.append(f"{streams}: keeps {row.kept_of_fair.median:.2f} of its throughput by fair share")
    if row.disturbance == STANDBY.name and row.rate_share is not None:
        if row.rate_share.median < LEAST_BESIDE_STANDBY:
            found.append(f"{streams}: {row.rate_share.median:.2f} × its throughput without")
    if row.against is not None and row.against.median < 1 and not baseline.startswith("ullm "):
        found.append(f"{streams}: {row.against.median:.2f} × {baseline}")
    return found


def _percent(ratio: Ratio | None) -> str:
    return "" if ratio is None else f" ({ratio.median:.0%})"


def _scaled(ratio: Ratio, factor: float) -> Ratio:
    return Ratio(ratio.median * factor, ratio.min * factor, ratio.max * factor)


def _ratio(ratio: Ratio | None) -> str:
    return "–" if ratio is None else f"{ratio.median:.2f} ({ratio.min:.2f}–{ratio.max:.2f})"
