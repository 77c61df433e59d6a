"""Run a command line: one line on stderr for an error, and the statuses of docs/reference/exit-status.md."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from ullm.cli.stdout import STDOUT
from ullm.errors import ConfigError, EngineDead, ResourceUnavailable, UllmError, UsageError
from ullm.hosting.config_sources import CONFIG_VARIABLE, ConfigFile
from ullm.logs import flush
from ullm.protocol import stop_budget
from ullm.protocol.exit_codes import EXIT_FAILED, EXIT_SIGNAL_BASE, EXIT_START_FAILED, EXIT_USAGE

MOVED = {"bench chaos": "ullm bench chaos is ullm chaos now"} | {
    f"bench {name}": f"ullm bench {name} is python -m tests.benchmarks {name} now, in a clone of ullm"
    for name in ("compare", "batch", "soak", "events", "startup", "pauses", "front-end")
}
"""Command of earlier versions → what to use instead."""


def run_command_line(
    app: App,
    arguments: Sequence[str],
    hint: Callable[[str], str | None] = lambda option: None,
    rename: Callable[[str, Sequence[str]], str] = lambda line, arguments: line,
) -> int:
    """Run ``app``; return the exit status.

    Args:
        hint: returns what to use instead of an option that ``app`` does not have, or None.
        rename: returns an error line, given the arguments, with the names of options as they were typed.
    """

    def complain(line: str, status: int) -> int:
        return _complain(rename(line, arguments), status)

    try:
        status = app(list(arguments), exit_on_error=False, print_error=False)
        _flush_output()
    except UnknownOptionError as error:
        advice = hint(str(error.token.keyword or error.token.value))
        return _complain(advice or " ".join(str(error).split()), EXIT_USAGE)
    except UnusedCliTokensError as error:
        rest = [str(token) for token in error.unused_tokens or ()]
        return _complain(_unused(rest, arguments, hint), EXIT_USAGE)
    except UnknownCommandError as error:
        command = " ".join(str(argument) for argument in arguments[:2])
        return _complain(MOVED.get(command) or " ".join(str(error).split()), EXIT_USAGE)
    except MissingArgumentError as error:
        return complain(_missing(error), EXIT_USAGE)
    except CycloptsError as error:
        return complain(" ".join(str(error).split()), EXIT_USAGE)
    except BaseException as error:
        return _failed(error, complain, debug=_wants_debug(arguments))
    return int(status or 0)


def _missing(error: MissingArgumentError) -> str:
    """Return an error line for an option without its value, or a command without what it is about."""
    command = " ".join(error.command_chain or ())
    name = error.keyword or (error.argument.name if error.argument is not None else "")
    what = f"{name} needs a value" if name.startswith("-") else f"{command} needs {name}"
    return f"{what}; see {f'ullm {command}'.strip()} --help"


def _unused(rest: Sequence[str], arguments: Sequence[str], hint: Callable[[str], str | None]) -> str:
    """Return an error line for words that are left over, with what is most likely meant.

    A prompt may begin with a dash, so an option of another program counts as one, and its value is left over.
    """
    advice = next(filter(None, (hint(each) for each in arguments if each.startswith("-"))), None)
    line = f"unexpected {'argument' if len(rest) == 1 else 'arguments'} {' '.join(rest)}"
    prompt = "; put a prompt of several words in quotes" if list(arguments[:1]) == ["generate"] else ""
    return advice or line + prompt


def run_function(function: Callable[[], int], *, debug: bool) -> int:
    """Run what a command line would run; return the exit status as `run_command_line` does."""
    try:
        return function()
    except BaseException as error:
        return _failed(error, _complain, debug=debug)


def _flush_output() -> None:
    if sys.stdout is None:  # closed when Python started
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = STDOUT  # the operating system names no file for a descriptor
        raise


def _failed(error: BaseException, complain: Callable[[str, int], int], *, debug: bool) -> int:
    """Return the exit status for an exception; re-raise one that is a bug."""
    from ullm.supervision.errors import SupervisionError, root_cause  # trio comes with it

    match root_cause(error):
        case KeyboardInterrupt():
            return EXIT_SIGNAL_BASE + signal.SIGINT
        case BrokenPipeError():
            _discard_output()  # its reader has closed it
            return EXIT_START_FAILED
        case OSError() as cause if cause.errno is not None:
            if cause.filename == STDOUT:
                _discard_output()
            place = "" if cause.filename is None else f"{cause.filename}: "
            return _complain(f"{place}{cause.strerror}", EXIT_START_FAILED)
        case (UllmError() | SupervisionError()) as cause:
            if debug:
                traceback.print_exception(error)
            return complain(" ".join(str(cause).split()), _status(cause))
    raise error


def _discard_output() -> None:
    """Send what is left for stdout to the null device, or Python complains at exit, too."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _status(cause: Exception) -> int:
    if isinstance(cause, (UsageError, ConfigError)) and not isinstance(cause, ResourceUnavailable):
        return EXIT_USAGE
    return EXIT_FAILED if isinstance(cause, EngineDead) else EXIT_START_FAILED


def _complain(line: str, status: int) -> int:
    flush(stop_budget.LOG_FLUSH)  # earlier log lines come first
    sys.stderr.write(f"error: {line}\n")
    return status


def _wants_debug(arguments: Sequence[str]) -> bool:
    flag = "--log-level"
    levels = [b for a, b in pairwise([*arguments, ""]) if a == flag]
    levels += [a.removeprefix(f"{flag}=") for a in arguments if a.startswith(f"{flag}=")]
    level = (levels or [os.environ.get("ULLM_LOG_LEVEL", "")])[-1]
    return (level or _level_in_file(arguments)) == "debug"


def _level_in_file(arguments: Sequence[str]) -> Any:
    """Return the level in the configuration file; None if it says nothing, or cannot be read."""
    flag = "--config"
    paths = [b for a, b in pairwise(arguments) if a == flag]
    paths += [a.removeprefix(f"{flag}=") for a in arguments if a.startswith(f"{flag}=")]
    path = (paths or [os.environ.get(CONFIG_VARIABLE, "")])[-1]
    try:
        return ConfigFile.read(path).values.get("log_level") if path else None
    except ConfigError:  # it is what the error line tells
        return None
