"""Errors of requests, on their way from the engine to a front end."""

from __future__ import annotations

import ullm.errors
from ullm.errors import ConfigError, RequestError, one_line
from ullm.link.messages import Fault


def to_fault(error: BaseException) -> Fault:
    """Return an error as a message."""
    message = error.message if isinstance(error, RequestError) else one_line(error)
    return Fault(
        type(error).__name__, message, getattr(error, "param", None), getattr(error, "retry_after", None)
    )


def to_error(fault: Fault) -> Exception:
    """Return the error that a message stands for; one of an unknown class becomes a plain `RuntimeError`."""
    kind = getattr(ullm.errors, fault.kind, None)
    if isinstance(kind, type) and issubclass(kind, ConfigError):
        return kind(fault.message)
    if not (isinstance(kind, type) and issubclass(kind, RequestError)):
        return RuntimeError(fault.message)
    error = kind.__new__(kind)
    RequestError.__init__(error, fault.message, fault.param)
    if fault.retry_after is not None:
        error.retry_after = fault.retry_after  # type: ignore[attr-defined]  # the classes that are tried again
    return error
