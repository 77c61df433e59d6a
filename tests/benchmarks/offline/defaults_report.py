"""The verdict of the benchmark `defaults`: does an option beat the default?"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tests.benchmarks.batch.batch_report import EngineReport
from tests.benchmarks.batch.engine_load import LOADING
from tests.benchmarks.compare.comparison import Line, figure_cell, ratio_cell
from tests.benchmarks.compare.comparison_rounds import Turn
from tests.benchmarks.offline.variants import AGAIN, Variant

MARGIN = 1.10
"""An option beats the default if the median of its ratios is above this."""


class VariantVerdict(msgspec.Struct, frozen=True):
    """What was found about a variant.

    Args:
        name: the participant's name in the report.
        counts: whether the option leaves weights, texts and independence of the batch as they are.
        same_texts: whether all generated tokens were the default's; None if they were never compared.
        beaten: metrics in which it beats the default, if it counts and its texts are the same.
    """

    name: str
    options: str
    counts: bool
    same_texts: bool | None
    beaten: list[str]


class DefaultsReport(msgspec.Struct, frozen=True):
    """The figures, and a verdict for each variant."""

    figures: EngineReport
    verdicts: list[VariantVerdict]

    @property
    def beaten(self) -> list[VariantVerdict]:
        """The variants that beat the default."""
        return [verdict for verdict in self.verdicts if verdict.beaten]

    def json(self) -> str:
        """Return the whole report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def markdown(self, default: str) -> str:
        """Return a table with a row for each variant, and the verdict."""
        lines = [line for line in self.figures.lines if line.metric != LOADING]
        head = ["", "counts", "texts", *(f"{line.metric.name}, {line.metric.unit}" for line in lines)]
        rows = [head, ["---", "---", "---", *["---:"] * len(lines)]]
        rows.append([default, "", "", *(figure_cell(line, default) for line in lines)])
        rows += [self._row(verdict, lines) for verdict in self.verdicts]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        explanation = (
            f"First the default's figures, then each option's ratio to them, round by round: median "
            f"(least–most); above 1 is faster. An option that counts beats the default above {MARGIN:.2f}; "
            f"*{AGAIN.name}* shows the noise."
        )
        parts = [self.figures.heading(), explanation, table, self._verdict(), *self.figures.ending()]
        return "\n\n".join(parts) + "\n"

    def _row(self, verdict: VariantVerdict, lines: Sequence[Line]) -> list[str]:
        texts = {True: "same", False: "other", None: "–"}[verdict.same_texts]
        cells = [ratio_cell(line, verdict.name) for line in lines]
        return [f"{verdict.name} `{verdict.options}`", "yes" if verdict.counts else "no", texts, *cells]

    def _verdict(self) -> str:
        if not self.beaten:
            return "No option that counts beats the default."
        return " ".join(
            f"**{each.name} beats the default: {', '.join(each.beaten)}.**" for each in self.beaten
        )


def judge(
    figures: EngineReport, turns: Sequence[Turn], default: str, variants: Sequence[Variant]
) -> DefaultsReport:
    """Judge each variant by the medians of its ratios to the default, and by its texts."""
    verdicts = []
    for variant in variants:
        name = f"ullm {variant.name}"
        same = same_texts(turns, default, name)
        beaten = beaten_in(figures.lines, name) if variant.counts and same is not False else []
        verdicts.append(VariantVerdict(name, variant.options, variant.counts, same, beaten))
    return DefaultsReport(figures, verdicts)


def beaten_in(lines: Sequence[Line], name: str) -> list[str]:
    """Return the metrics, other than that of loading, in which a participant beats the default."""
    entries = [(line.metric, line.entries.get(name)) for line in lines if line.metric != LOADING]
    return [
        metric.name
        for metric, entry in entries
        if entry is not None and entry.ratio is not None and entry.ratio.median > MARGIN
    ]


def same_texts(turns: Sequence[Turn], default: str, name: str) -> bool | None:
    """Return whether a participant's tokens were the default's in all rounds that both finished."""
    texts: dict[tuple[int, str], dict[str, str]] = {
        (turn.round, turn.candidate): turn.figures.texts for turn in turns if turn.figures is not None
    }
    rounds = {number for number, _ in texts}
    pairs = [
        (texts[number, default], texts[number, name])
        for number in rounds
        if (number, default) in texts and (number, name) in texts
    ]
    return all(first == second for first, second in pairs) if pairs else None


def suspects(report: DefaultsReport, variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants that seem to beat the default."""
    names = {verdict.name for verdict in report.beaten}
    return [variant for variant in variants if f"ullm {variant.name}" in names]
