"""What became of a tiny model of each architecture: written by `tests.model.tiny_architectures`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("every_architecture.json")


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture.

    Args:
        name: its class.
        verdict: ``native``, ``transformers``, ``refused``, or ``untried``: no tiny model runs.
        reason: of a refusal, as users read it, or why it was not tried.
        error: largest difference of a logit.
    """

    name: str
    verdict: str
    reason: str = ""
    error: float = 0.0


def known_outcomes() -> dict[str, Outcome]:
    """Return what `TABLE` has: ``model_type`` → outcome, whose error is left out."""
    return {kind: Outcome(**values) for kind, values in json.loads(TABLE.read_text("utf-8")).items()}
