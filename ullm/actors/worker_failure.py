"""Turns the failure that a worker reports into one of the engine's errors."""

from __future__ import annotations

from ullm import errors
from ullm.actors.transports.base import Transport
from ullm.errors import ConfigError, ModelError, UllmError, WorkerFailed
from ullm.logs import get_logger
from ullm.protocol.messages import Failed, FromWorker, NotUnderstood

log = get_logger(__name__)


def checked(transport: Transport, message: FromWorker) -> FromWorker:
    """Return the message, unless it reports a failure.

    Raises:
        ModelError, ConfigError: trying again would not help.
        WorkerFailed: the worker is useless from now on.
    """
    match message:
        case Failed():
            log.debug("worker failed", worker=transport.name, traceback=message.traceback)
            raise failure(transport.name, message)
        case NotUnderstood():
            raise WorkerFailed(transport.name, f"did not understand a message: {message.detail}")
    return message


def failure(name: str, message: Failed) -> UllmError:
    """Return the worker's exception as one of the engine's.

    An error that tells the user what to do is returned as itself, word for word; anything else is the loss
    of the worker.
    """
    kind = getattr(errors, message.kind, None)
    if isinstance(kind, type) and issubclass(kind, (ModelError, ConfigError)):
        error = kind.__new__(kind)  # its constructor would build the message a second time
        error.args = (message.message,)
        return error
    return WorkerFailed(name, f"failed: {message.kind}: {message.message}")
