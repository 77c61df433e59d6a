"""The table of architectures, from what became of a tiny model of each."""

from __future__ import annotations

from tests.model.outcomes import Outcome, known_outcomes
from ullm.model.architectures.transformers_ranks import TRIED

HOW = {"native": "native", "transformers": "through transformers' code"}
INTRO = """Of the {all} architectures, {equal} compute the same as transformers: {native} natively and
{foreign} through transformers' code. {refused} are refused, and of {untried} no tiny model could be made
or run.
"""


def count(outcomes: list[Outcome], *verdicts: str) -> int:
    """Return how many have one of the verdicts."""
    return sum(outcome.verdict in verdicts for outcome in outcomes)


def architecture_table() -> str:
    """Return the counts, and a row for each architecture."""
    table = known_outcomes()
    found = list(table.values())
    intro = INTRO.format(
        all=len(found),
        equal=count(found, "native", "transformers"),
        native=count(found, "native"),
        foreign=count(found, "transformers"),
        refused=count(found, "refused"),
        untried=count(found, "untried"),
    )
    rows = ["| `model_type` | class | runs | why not |", "|---|---|---|---|"]
    for kind, outcome in table.items():
        how = HOW.get(outcome.verdict, "no" if outcome.verdict == "refused" else "not tried")
        if outcome.verdict == "transformers" and kind in TRIED:
            how += ", on several ranks, too"
        reason = outcome.reason.removeprefix(f"{outcome.name}: ").replace("|", "\\|")
        rows.append(f"| `{kind}` | `{outcome.name}` | {how} | {reason} |")
    return intro + "\n" + "\n".join(rows) + "\n"
