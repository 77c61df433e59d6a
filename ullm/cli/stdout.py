"""stdin and stdout as commands need them: UTF-8, and errors of stdout say that they are its."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any

STDOUT = "stdout"
"""The name of it in errors."""


class _Stdout(io.FileIO):
    """stdout's descriptor, with its name in errors: the operating system names no file for a descriptor."""

    def write(self, data: Any, /) -> int:
        """Write some bytes; return how many."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise


def prepare_stdin() -> None:
    """Read what is piped in as UTF-8 whatever the locale, unless ``PYTHONIOENCODING`` says otherwise."""
    told = os.environ.get("PYTHONIOENCODING")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty() and not told:
        with suppress(io.UnsupportedOperation):  # whoever has read of it before goes on as it began
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def prepare_stdout() -> None:
    """Have stdout take every character, and have errors of writing to it name it.

    It is UTF-8 whatever the locale, unless ``PYTHONIOENCODING`` says otherwise; then some may become ``?``.
    """
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper):
        return  # closed, or a test's
    encoding = stdout.encoding if os.environ.get("PYTHONIOENCODING") else "utf-8"
    stdout.reconfigure(encoding=encoding, errors="replace")
    buffer: Any = stdout.buffer
    raw = getattr(buffer, "raw", buffer)  # with python -u there is no buffer
    if stdout is sys.__stdout__ and type(raw) is io.FileIO:
        stdout.flush()
        named = _Stdout(stdout.fileno(), "wb", closefd=False)
        target: Any = named if raw is buffer else io.BufferedWriter(named)
        sys.stdout = io.TextIOWrapper(
            target,
            encoding=encoding,
            errors="replace",
            line_buffering=stdout.line_buffering,
            write_through=stdout.write_through,
        )
