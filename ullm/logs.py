"""Structured logging on top of the standard library's.

Loggers are structlog's in front of `logging`, with processors of their own, so that an embedding
program's configuration of either library is left alone. Only entry points call `configure`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from typing import Any

MAX_QUEUED = 10_000
"""Lines that may wait to be written; further ones are dropped, and counted."""


logging.getLogger("ullm").addHandler(logging.NullHandler())
"""As libraries do: a program that does not configure logging is not written to."""


class Logger:
    """A logger of structlog's that is made when it first has something to say: the import takes 50 ms,
    and most workers never say anything."""

    def __init__(self, name: str) -> None:
        self._records = logging.getLogger(name)
        self._logger: Any = None

    def log(self, level: int, event: str, /, *arguments: object, **values: object) -> None:
        """Write a record of a level."""
        if not self._records.isEnabledFor(level):
            return
        if self._logger is None:
            self._logger = _wrap(self._records)
        free = {f"{key}_" if key in _TAKEN else key: value for key, value in values.items()}
        self._logger.log(level, event, *arguments, **free)

    def debug(self, event: str, /, *arguments: object, **values: object) -> None:
        """For who looks into ullm itself."""
        self.log(logging.DEBUG, event, *arguments, **values)

    def info(self, event: str, /, *arguments: object, **values: object) -> None:
        """For who runs a server."""
        self.log(logging.INFO, event, *arguments, **values)

    def warning(self, event: str, /, *arguments: object, **values: object) -> None:
        """Something is not as it should be."""
        self.log(logging.WARNING, event, *arguments, **values)

    def error(self, event: str, /, *arguments: object, **values: object) -> None:
        """Something has failed."""
        self.log(logging.ERROR, event, *arguments, **values)

    def exception(self, event: str, /, *arguments: object, **values: object) -> None:
        """Something has failed; with the traceback of the exception that is being handled."""
        self.log(logging.ERROR, event, *arguments, exc_info=True, **values)


def get_logger(name: str) -> Logger:
    """A logger whose calls take an event and key-value pairs: ``log.info("loaded", seconds=0.4)``."""
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


_TAKEN = _STANDARD - {"exc_info", "stack_info"} | {"level", "event", "extra", "self"}
"""Keys that `logging` and structlog have uses of their own for."""


class KeyValueFormatter(logging.Formatter):
    """``12:00:00.123 info  ullm.router  replica lost  replica=0 epoch=1``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line per record, and the traceback if there is one."""
        clock = self.formatTime(record, "%H:%M:%S") + f".{int(record.msecs):03d}"
        pairs = " ".join(f"{key}={value!s}" for key, value in _extras(record).items())
        line = f"{clock} {record.levelname.lower():7} {record.name}  {record.getMessage()}  {pairs}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """Keys ``time`` (seconds since 1970), ``level``, ``logger``, ``event`` and the record's own."""
        body: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


class PatientWriter(logging.Handler):
    """Writes to a descriptor in a thread of its own: a reader that is slow, or has stopped to read, must not
    hold up an event loop.

    Args:
        descriptor: a file, a terminal or a pipe.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(MAX_QUEUED)
        self._dropped = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line."""
        line = self.format(record)
        if self._dropped:
            line += f"\n{self._dropped} lines before this one were dropped: nobody reads fast enough"
        try:
            self._lines.put_nowait(line + "\n")
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def flush(self, seconds: float = 1.0) -> None:
        """Wait until all is written, so many seconds at most. Python calls it at its end."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, seconds)

    def _write(self) -> None:
        while True:
            data = self._lines.get().encode("utf-8", "backslashreplace")
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # nobody will ever read it
                data = b""
            self._lines.task_done()


def flush(seconds: float) -> None:
    """Wait until what was logged is written, so many seconds at most."""
    for handler in logging.getLogger("ullm").handlers:
        if isinstance(handler, PatientWriter):  # any other writes at once
            handler.flush(seconds)


def _stderr_handler(*, as_json: bool) -> logging.Handler:
    """A worker's own stderr is read by its parent, and a worker may end at any moment: it writes at once."""
    if not as_json:
        try:
            return PatientWriter(sys.stderr.fileno())
        except (AttributeError, OSError, ValueError):  # replaced by something that is no file
            pass
    return logging.StreamHandler(sys.stderr)


def configure(level: str = "info", *, as_json: bool = False) -> None:
    """Send ullm's logs to stderr. Called by entry points, never by the library."""
    handler = _stderr_handler(as_json=as_json)
    handler.setFormatter(JsonFormatter() if as_json else KeyValueFormatter())
    root = logging.getLogger("ullm")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
