"""What must hold whatever went wrong: each says what is missing, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

SHOWN = 5
"""Tokens shown on each side of the first difference."""

SHOWN_CHARACTERS = 40


def assert_no_token_lost(expected: Sequence[int], got: Sequence[int]) -> None:
    """No token is missing, repeated, changed or out of order.

    Args:
        expected: of an undisturbed run, or `scripted_tokens`.
        got: of the disturbed one.
    """
    expected, got = list(expected), list(got)
    if expected == got:
        return
    at = _first_difference(expected, got)
    raise AssertionError(
        f"{_what(expected, got, at)} at token {at} of {len(expected)} ({len(got)} came): "
        f"expected …{_around(expected, at)}…, got …{_around(got, at)}…"
    )


def assert_same_text(expected: str, got: str) -> None:
    """Two texts are equal, to the last character."""
    if expected == got:
        return
    at = _first_difference(expected, got)
    begin = max(0, at - SHOWN_CHARACTERS)
    raise AssertionError(
        f"the texts differ at character {at} ({len(expected)} expected, {len(got)} came): "
        f"expected {expected[begin : at + SHOWN_CHARACTERS]!r}, got {got[begin : at + SHOWN_CHARACTERS]!r}"
    )


def assert_finished_once(outputs: Iterable[Any], reason: str | None = None, *, choices: int = 1) -> None:
    """Each choice of a request has exactly one final event, and nothing after it.

    Args:
        outputs: what a `Generation` yielded, or the chunks of an OpenAI stream, as objects or as dicts.
        reason: what each finish reason must be; None: any.
        choices: how many the request asked for.
    """
    finished: dict[int, str] = {}
    for number, (index, found) in enumerate(part for output in outputs for part in _parts(output)):
        if index in finished:
            raise AssertionError(
                f"choice {index} went on in event {number}, after it had ended with {finished[index]!r}"
            )
        if found is not None:
            finished[index] = found
    if len(finished) != choices:
        raise AssertionError(f"{choices} choices were asked for, and {len(finished)} ended: {finished}")
    wrong = {index: found for index, found in finished.items() if reason not in (None, found)}
    if wrong:
        raise AssertionError(f"expected finish reason {reason!r}, got {wrong}")


def _parts(output: Any) -> list[tuple[int, str | None]]:
    """Index and finish reason of each choice in one event."""
    choices = _get(output, "choices")
    if choices is None:
        choices = [output]
    return [(int(_get(choice, "index") or 0), _get(choice, "finish_reason")) for choice in choices]


def _get(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, dict) else getattr(thing, name, None)


def _first_difference(expected: Sequence[object], got: Sequence[object]) -> int:
    pairs = enumerate(zip(expected, got, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(expected), len(got)))


def _around(tokens: list[int], at: int) -> list[int]:
    return tokens[max(0, at - SHOWN) : at + SHOWN]


def _what(expected: list[int], got: list[int], at: int) -> str:
    """Name the difference; the text after it shows whether tokens were left out or repeated."""
    rest, came = expected[at:], got[at:]
    if not came:
        return f"{len(rest)} tokens are missing"
    if not rest:
        return f"{len(came)} tokens too many"
    skipped = next((n for n in range(1, len(rest)) if rest[n:] == came[: len(rest) - n]), 0)
    if skipped:
        return f"{skipped} tokens are missing"
    repeated = next((n for n in range(1, len(came)) if came[n:] == rest[: len(came) - n]), 0)
    return f"{repeated} tokens too many" if repeated else "another token"
