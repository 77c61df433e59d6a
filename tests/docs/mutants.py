"""The table of mutants: which promise each breaks, and what notices."""

from __future__ import annotations

from tests.mutants.catalogue import MUTANTS


def mutant_table() -> str:
    """Return the table."""
    lines = ["| mutant | promise that it breaks | noticed by |", "|---|---|---|"]
    for mutant in MUTANTS:
        checks = ", ".join(check.text for check in mutant.checks)
        lines.append(f"| {mutant.name} | {mutant.promise} | {checks} |")
    return "\n".join(lines) + "\n"
