"""What others hear of a supervisor: its log lines, and the functions that it calls back."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ullm.supervision.errors import describe

log = logging.getLogger("ullm.supervision")


def log_failure(event: str, error: BaseException, **names: str) -> None:
    """Log a warning whose text says who and why; the traceback is in the record's ``exc_info``.

    Args:
        event: what happened.
        error: the cause; one that was never raised has no traceback, and the record then has none either.
        names: who, such as ``supervisor="demo", child="flaky"``; they come before the cause.
    """
    values = {**names, "cause": describe(error)}
    text = " ".join(f"{key}=%({key})s" for key in values)
    log.warning(f"{event}  {text}", values, exc_info=error if error.__traceback__ is not None else None)


def call_hook(
    name: str, hook: Callable[..., object] | None, *args: object, supervisor: str, child: str
) -> None:
    """Call a function of the user's, if there is one; an exception of it is logged and has no other effect.

    Args:
        name: what the hook is called, for the log.
        args: what it is called with.
    """
    if hook is None:
        return
    try:
        hook(*args)
    except Exception as error:
        log.exception(
            f"{name} failed  supervisor=%(supervisor)s child=%(child)s cause=%(cause)s",
            {"supervisor": supervisor, "child": child, "cause": describe(error)},
        )
