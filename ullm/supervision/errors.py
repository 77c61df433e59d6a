"""Errors that the library raises, and helpers to find the cause within wrapped ones."""

from __future__ import annotations


class SupervisionError(Exception):
    """An actor or a supervisor could not do what it was asked to.

    Raised by: nobody as such; it is the base of all errors of this library.
    Remedy: catch one of its subclasses where one of them can be handled.
    """


class InvalidSpec(SupervisionError, ValueError):
    """A child specification or a supervisor's options have a value that makes no sense.

    Raised by: `ChildSpec`, `open_supervisor`, `supervisor_child` and `Supervisor.start_child`.
    Remedy: correct the value that the message names.
    """


class MailboxClosed(SupervisionError):
    """A mailbox was used after it had been closed.

    Raised by: `Mailbox.send`, `Mailbox.send_nowait`, `Mailbox.receive` and `Mailbox.receive_nowait`.
    Remedy: send before the mailbox is closed; a receiver ends its loop.
    """


class MailboxFull(SupervisionError):
    """A bounded mailbox had no room for a message sent without waiting.

    Raised by: `Mailbox.send_nowait`.
    Remedy: wait for room with `Mailbox.send`, refuse the work, or give the mailbox a larger capacity.
    """


class AskTimeout(SupervisionError):
    """An actor did not answer in time.

    Raised by: `ask`.
    Remedy: ask again, or allow more time; if it persists, find out what blocks the actor.
    """


class ActorLost(SupervisionError):
    """An actor ended before it answered, or its supervisor is stopping.

    Raised by: `ask`, and by the methods that change a supervisor's children.
    Remedy: ask again if the actor is restarted; stop if its supervisor stops.
    """


class StartFailed(SupervisionError):
    """A child failed before it was ready.

    Raised by: `open_supervisor`, `Supervisor.start_child` and `Supervisor.restart_child`.
    Remedy: remove the cause, which is in `cause`, and start the child again.

    Args:
        child_id: the child.
        cause: the exception that ended it.
    """

    def __init__(self, child_id: str, cause: BaseException) -> None:
        super().__init__(f"child {child_id!r} failed to start: {cause}")
        self.child_id = child_id
        self.cause = cause


class RestartLimitReached(SupervisionError):
    """The children of a supervisor failed more often than its intensity allows.

    Raised by: `open_supervisor`, when the tree has been stopped.
    Remedy: remove the cause, which is in `cause`, or allow more restarts by ``intensity`` and ``period``.

    Args:
        supervisor: name of the supervisor.
        intensity: restarts allowed within one period.
        period: seconds.
        cause: the exception that ended a child last.
        child_id: that child.
    """

    def __init__(
        self,
        supervisor: str,
        intensity: float,
        period: float,
        cause: BaseException | None,
        child_id: str = "",
    ) -> None:
        last = f"child {child_id!r}: {cause}" if child_id else str(cause)
        super().__init__(
            f"supervisor {supervisor!r}: more than {intensity:g} restarts within {period:g} s; "
            f"last cause: {last}"
        )
        self.cause = cause
        self.child_id = child_id


class ChildNotFound(SupervisionError, LookupError):
    """The supervisor has no child of this id.

    Raised by: the methods of `Supervisor` that take a ``child_id``.
    Remedy: use an id from `Supervisor.which_children`.
    """

    def __init__(self, supervisor: str, child_id: str) -> None:
        super().__init__(f"supervisor {supervisor!r} has no child {child_id!r}")


class ChildConflict(SupervisionError):
    """The child's status does not allow the change.

    Raised by: `Supervisor.start_child`, `Supervisor.restart_child` and `Supervisor.delete_child`.
    Remedy: terminate the child before it is restarted or deleted; delete it before its id is used again.

    Args:
        status: the child's, as in `ChildStatus`.
    """

    def __init__(self, supervisor: str, child_id: str, status: str) -> None:
        super().__init__(f"child {child_id!r} of supervisor {supervisor!r} exists and is {status}")
        self.status = status


def root_cause(error: BaseException) -> BaseException:
    """Return the exception inside nested groups of one exception each, which trio's nurseries make.

    A group of several exceptions is returned as it is.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def first_cause(error: BaseException) -> BaseException:
    """Return what went wrong first, without the groups and supervisors that the error passed through.

    In a group, that is the first `Exception`; the cancellations beside it are its consequences.
    """
    while True:
        if isinstance(error, BaseExceptionGroup):
            inner: list[BaseException] = list(error.exceptions)
            error = next((one for one in inner if isinstance(one, Exception)), inner[0])
        elif isinstance(error, StartFailed | RestartLimitReached) and error.cause is not None:
            error = error.cause
        else:
            return error


def describe(error: BaseException) -> str:
    """Return one line: the class of the error and the first line of its message."""
    error = root_cause(error)
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
