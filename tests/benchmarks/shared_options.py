"""Options that several benchmarks share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ullm.errors import UsageError

Model = Annotated[str, Parameter(help="Model, as for ullm serve --model.")]
ServerText = Annotated[
    str, Parameter(name="--server", help="More options of ullm serve, in quotes.", allow_leading_hyphen=True)
]
JsonObject = Annotated[
    str, Parameter(help="The engine's own options, as a JSON object.", allow_leading_hyphen=True)
]
Rounds = Annotated[int, Parameter(help="Number of rounds; each measures every participant once.")]
Baseline = Annotated[
    str | None, Parameter(help="Participant to compare the others with; default: the first peer.")
]
Plot = Annotated[Literal["png", "svg", "none"], Parameter(help="Format of the plot.")]
StepMilliseconds = Annotated[
    float, Parameter(help="Duration of a step of the scripted model, in milliseconds.")
]


def split_server_options(text: str) -> tuple[str, ...]:
    """Return the words of the options of ``ullm serve``."""
    return tuple(shlex.split(text))


def parse_numbers(values: list[str], flag: str, least: int = 1) -> list[int]:
    """Return the numbers of an option that lists them.

    Raises:
        UsageError: not whole numbers from ``least`` on; names the flag.
    """
    try:
        numbers = [int(value) for value in values]
    except ValueError:
        numbers = [-1]
    if any(number < least for number in numbers):
        raise UsageError(
            f"{flag} {','.join(values)}: expected numbers above {least - 1}, "
            "separated by commas, as in 512,2048"
        )
    return numbers


def write_report(markdown: str, json: str, output: Path | None) -> None:
    """Write a report to a file: Markdown if its name ends in .md, else JSON."""
    if output is not None:
        output.write_text(markdown if output.suffix == ".md" else json + "\n", encoding="utf-8")
