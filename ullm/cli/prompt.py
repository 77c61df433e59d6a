"""The prompt of ``ullm generate``: from the command line, from stdin, or from both."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Sequence

from ullm.errors import UsageError

Question = str | list[dict[str, str]]
"""A text to be continued, or messages with ``role`` and ``content``."""

LITERAL = "\0"
"""Marks a prompt that came after ``--``; no argument of a process can hold this character."""
_OPTION = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
"""What can only be a mistyped option; a text that begins with dashes has a blank sooner or later."""


def read_prompt(prompt: str | None) -> str:
    """Return the prompt, after the text that is piped in; for ``-``, or without one, that text alone.

    Args:
        prompt: as `with_literal_prompt` leaves it.

    Raises:
        UsageError: there is no prompt, it is empty, it looks like an option, or it is not text.
    """
    if prompt is None and not _is_piped():
        raise UsageError('generate needs a prompt: ullm generate "Why is the sky blue?", or - to read stdin')
    if prompt is not None and _OPTION.fullmatch(prompt):
        raise UsageError(f"unknown option: {prompt}; see ullm generate --help, or put -- before a prompt")
    if prompt is None or prompt == "-":
        text = _read_stdin()
    else:
        text = _as_utf8(prompt.removeprefix(LITERAL))
        if text.strip() and _is_piped() and (piped := _read_stdin()).strip():
            text = f"{piped.rstrip()}\n\n{text}"
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def with_literal_prompt(line: Sequence[str]) -> list[str]:
    """Return a command line in which the prompt after ``--`` is marked as one, whatever it looks like."""
    arguments = list(line)
    if arguments[:1] == ["generate"] and arguments[-2:-1] == ["--"] and "--" not in arguments[:-2]:
        arguments[-1] = LITERAL + arguments[-1]
    return arguments


def _as_utf8(argument: str) -> str:
    """Return an argument read as UTF-8; Python has decoded it by the locale, which may be plain ASCII.

    Raises:
        UsageError: it is not UTF-8.
    """
    if sys.platform == "win32":  # where arguments are text
        return argument
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise UsageError(
            "the prompt is not UTF-8; convert it, or pipe it in with PYTHONIOENCODING set to its encoding"
        ) from None


def _is_piped() -> bool:
    """Return whether stdin is a pipe or a file; a terminal, /dev/null and a service's socket are not read."""
    if sys.stdin is None:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed, or no file of the operating system's
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read_stdin() -> str:
    try:
        return "" if sys.stdin is None else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not {error.encoding} text; convert it, or set PYTHONIOENCODING to its encoding"
        ) from None


def compose(prompt: str, system: str | None, *, raw: bool) -> Question:
    """Return a conversation of one question, or the text itself if ``raw``.

    Raises:
        UsageError: the system message is not UTF-8.
    """
    if raw:
        return prompt
    question = {"role": "user", "content": prompt}
    return [question] if system is None else [{"role": "system", "content": _as_utf8(system)}, question]
