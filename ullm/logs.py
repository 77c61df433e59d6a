"""Structured logging on top of the standard library's.

Loggers are structlog's in front of `logging`, with processors of their own, so that the configuration of
either library by an embedding program is left alone. Only entry points call `configure`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any

MAX_QUEUED = 10_000
"""Maximum number of lines that wait to be written; further ones are dropped and counted."""


logging.getLogger("ullm").addHandler(logging.NullHandler())
"""As usual for libraries: nothing is printed unless the program configures logging."""


class Logger:
    """A structlog logger made at its first record: the import takes 50 ms, and most workers log nothing."""

    def __init__(self, name: str) -> None:
        self._records = logging.getLogger(name)
        self._logger: Any = None

    def log(self, level: int, event: str, /, *arguments: object, **values: object) -> None:
        """Log an event at a level; lines below the configured level cost nothing."""
        if not self._records.isEnabledFor(level):
            return
        if self._logger is None:
            self._logger = _wrap(self._records)
        renamed = {f"{key}_" if key in _RESERVED else key: value for key, value in values.items()}
        self._logger.log(level, event, *arguments, **renamed)

    def debug(self, event: str, /, *arguments: object, **values: object) -> None:
        """Log an event for developers of ullm."""
        self.log(logging.DEBUG, event, *arguments, **values)

    def info(self, event: str, /, *arguments: object, **values: object) -> None:
        """Log an event for operators of a server."""
        self.log(logging.INFO, event, *arguments, **values)

    def warning(self, event: str, /, *arguments: object, **values: object) -> None:
        """Log that something is not as it should be."""
        self.log(logging.WARNING, event, *arguments, **values)

    def error(self, event: str, /, *arguments: object, **values: object) -> None:
        """Log a failure."""
        self.log(logging.ERROR, event, *arguments, **values)

    def exception(self, event: str, /, *arguments: object, **values: object) -> None:
        """Log a failure with the traceback of the exception that is being handled."""
        self.log(logging.ERROR, event, *arguments, exc_info=True, **values)


def get_logger(name: str) -> Logger:
    """Return a logger whose calls take an event and key-value pairs: ``log.info("loaded", seconds=0.4)``."""
    return Logger(name)


def _wrap(records: logging.Logger) -> Any:
    import structlog

    return structlog.wrap_logger(
        records,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            structlog.stdlib.render_to_log_kwargs,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


_RESERVED = _STANDARD - {"exc_info", "stack_info"} | {"level", "event", "extra", "self"}
"""Keys that `logging` and structlog use themselves; a value of such a name gets an underscore behind it."""


def _shows_traceback(record: logging.LogRecord) -> bool:
    """Return whether a record's traceback is written: those below error, such as a child's, at debug only."""
    return record.levelno >= logging.ERROR or logging.getLogger("ullm").isEnabledFor(logging.DEBUG)


class KeyValueFormatter(logging.Formatter):
    """Lines such as ``2026-01-31T12:00:00.123+01:00 info    ullm.actors.router  replica down  replica=0``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line for a record, and its traceback if there is one."""
        clock = _date(record)
        pairs = " ".join(f"{key}={value!s}" for key, value in _extras(record).items())
        line = f"{clock} {record.levelname.lower():7} {record.name}  {record.getMessage()}  {pairs}".rstrip()
        if record.exc_info and _shows_traceback(record):
            line += f"\n{self.formatException(record.exc_info)}"
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return an object with ``time`` (s since 1970), ``date``, ``level``, ``logger``, ``event``, values.

        Values are the record's extra attributes, and arguments that its message names: `ullm.supervision`,
        which knows nothing of this module, logs ``"child failed  child=%(child)s", {"child": "a"}``.
        """
        body: dict[str, Any] = {
            "time": record.created,
            "date": _date(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _event(record),
            **(record.args if isinstance(record.args, Mapping) else {}),
            **_extras(record),
        }
        if record.exc_info and _shows_traceback(record):
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


class PatientWriter(logging.Handler):
    """Write to a descriptor in a thread, so that a slow or stopped reader does not block an event loop.

    Args:
        descriptor: that of a file, a terminal or a pipe.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(MAX_QUEUED)
        self._dropped = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line of a record."""
        line = self.format(record)
        if self._dropped:
            line += f"\n{self._dropped} lines before this one were dropped: the log is read too slowly"
        try:
            self._lines.put_nowait(line + "\n")
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def flush(self, seconds: float = 1.0) -> None:
        """Wait until all lines are written, at most ``seconds`` seconds; Python does so at its exit."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, seconds)

    def _write(self) -> None:
        while True:
            data = self._lines.get().encode("utf-8", "backslashreplace")
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # the reader is gone for good
                data = b""
            self._lines.task_done()


def flush(seconds: float) -> None:
    """Wait until the lines logged so far are written, at most ``seconds`` seconds."""
    for handler in logging.getLogger("ullm").handlers:
        if isinstance(handler, PatientWriter):  # any other writes at once
            handler.flush(seconds)


def _stderr_handler(*, at_once: bool) -> logging.Handler:
    if not at_once:
        try:
            return PatientWriter(sys.stderr.fileno())
        except (AttributeError, OSError, ValueError):  # stderr was replaced by something that is not a file
            pass
    return logging.StreamHandler(sys.stderr)


def configure(level: str = "info", *, as_json: bool = False, at_once: bool = False) -> None:
    """Send the logs of ullm to stderr; called by entry points, never by the library.

    Args:
        level: lines below it are dropped: debug, info, warning or error.
        as_json: write one JSON object per line, not text.
        at_once: write each line before going on, as a worker does, which may end at any moment.
    """
    handler = _stderr_handler(at_once=at_once)
    handler.setFormatter(JsonFormatter() if as_json else KeyValueFormatter())
    root = logging.getLogger("ullm")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def is_configured() -> bool:
    """Return whether somebody else than `configure` has decided where the logs of ullm go."""
    own, root = logging.getLogger("ullm"), logging.getLogger()
    if any(isinstance(handler.formatter, KeyValueFormatter | JsonFormatter) for handler in own.handlers):
        return False
    handled = any(not isinstance(handler, logging.NullHandler) for handler in (*own.handlers, *root.handlers))
    return handled or own.level != logging.NOTSET or not own.propagate


def _date(record: logging.LogRecord) -> str:
    """Return the local date and time of a record, with the zone's offset (ISO 8601)."""
    return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


def _event(record: logging.LogRecord) -> str:
    """Return the message, or its constant part where its arguments are values that it names."""
    return str(record.msg).partition("  ")[0] if isinstance(record.args, Mapping) else record.getMessage()


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    """Return a record's values, without the private ones that other libraries give to all records."""
    values = vars(record).items()
    return {key: value for key, value in values if key not in _STANDARD and not key.startswith("_")}
