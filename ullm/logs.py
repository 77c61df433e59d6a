"""Structured logging on top of the standard library's.

Loggers are structlog's in front of `logging`, with processors of their own, so that an embedding
program's configuration of either library is left alone. Only entry points call `configure`.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any


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


def configure(level: str = "info", *, as_json: bool = False) -> None:
    """Send ullm's logs to stderr. Called by entry points, never by the library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else KeyValueFormatter())
    root = logging.getLogger("ullm")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
