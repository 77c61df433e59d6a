"""Options that several commands share, besides those that `flags` derives from the configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter, Token

LOAD = Group("Load")


def whole_number(annotation: Any, tokens: Sequence[Token]) -> int:
    """Return an option's number; the library would round one with a fraction.

    Raises:
        ValueError: it is no whole number.
    """
    (token,) = tokens
    try:
        return int(token.value, 0)
    except ValueError:
        pass
    try:
        return int(token.value)  # with zeros before it
    except ValueError:
        number = float(token.value) if "." in token.value else math.nan
        if not number.is_integer():
            raise ValueError(f'"{token.value}" is not a whole number') from None
        return int(number)


ApiKey = Annotated[str | None, Parameter(help="Bearer token for --url.", env_var="ULLM_API_KEY")]
Json = Annotated[bool, Parameter(help="Print JSON instead of a table.", negative="")]
Output = Annotated[
    Path | None, Parameter(help="File for the report: Markdown if its name ends in .md, else JSON.")
]
Seed = Annotated[int, Parameter(help="Seed of the prompts; equal seeds give equal requests.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The load of ``ullm bench serve`` and ``ullm bench engine``, as it is typed in."""

    concurrency: Annotated[
        list[str] | None,
        Parameter(
            help="Numbers of requests in flight; each is one run. Default: 1,4,16,32.",
            group=LOAD,
            negative="",
        ),
    ] = None
    requests: Annotated[
        int | None,
        Parameter(
            help="Requests per run; default: the concurrency, but at least 4.",
            group=LOAD,
            converter=whole_number,
        ),
    ] = None
    prompt_words: Annotated[
        str, Parameter(help="Words per prompt: a number, or a range such as 8-64.", group=LOAD)
    ] = "32"
    output_tokens: Annotated[
        str, Parameter(help="Tokens to generate per request: a number, or a range such as 8-64.", group=LOAD)
    ] = "128"
    shared_prefix: Annotated[
        int,
        Parameter(
            help="Words that all prompts begin with, to measure the prefix cache.",
            group=LOAD,
            converter=whole_number,
        ),
    ] = 0
    seed: Annotated[
        int,
        Parameter(
            help="Seed of the prompts; equal seeds give equal requests.", group=LOAD, converter=whole_number
        ),
    ] = 0
    temperature: Annotated[float, Parameter(help="Sampling temperature; 0 is greedy.", group=LOAD)] = 0.0
    top_p: Annotated[
        float, Parameter(help="Nucleus sampling; matters at a temperature above 0.", group=LOAD)
    ] = 1.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    """What ``ullm chaos`` does, as it is typed in."""

    model: Annotated[
        str, Parameter(help="scripted or tiny, which are written for the run, or a model as for ullm serve.")
    ] = "scripted"
    seed: Annotated[
        int,
        Parameter(
            help="Seed of the faults; equal seeds give equal faults in the same order.",
            converter=whole_number,
        ),
    ] = 0
    faults: Annotated[int, Parameter(help="Number of faults to inject.", converter=whole_number)] = 100
    seconds: Annotated[float, Parameter(help="Seconds within which all faults must be injected.")] = 90.0
    max_gap: Annotated[
        float, Parameter(help="Seconds for which a stream may be silent whose client reads.")
    ] = 12.0
    min_answered: Annotated[
        int | None,
        Parameter(
            help="Answers that there must be while faults come. Default: one for each client.",
            converter=whole_number,
        ),
    ] = None
    bursts: Annotated[
        float,
        Parameter(help="Share of the moments in which two or three faults are injected at once; 0: never."),
    ] = 0.25
    streams: Annotated[
        int, Parameter(help="Clients that send one request after another.", converter=whole_number)
    ] = 8
    kinds: Annotated[
        list[str] | None,
        Parameter(help="Inject only these kinds, as in worker,client.slow. Default: all.", negative=""),
    ] = None
    server: Annotated[
        str, Parameter(help="More options of ullm serve, in quotes.", allow_leading_hyphen=True)
    ] = ""
    output: Annotated[Path | None, Parameter(help="File for the report as JSON, which --replay takes.")] = (
        None
    )
    log: Annotated[Path | None, Parameter(help="File for the server's log.")] = None
    replay: Annotated[
        Path | None,
        Parameter(help="Report of an earlier run: run it again. Its own options replace those given here."),
    ] = None


def split_commas(values: list[str] | None) -> list[str]:
    """Return the values of an option that lists, which may be repeated and may hold commas."""
    return [part.strip() for value in values or () for part in value.split(",")]
