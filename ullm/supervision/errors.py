"""Errors that the library raises, and helpers to find the cause within wrapped ones."""

from __future__ import annotations

from typing import Final

SHOWN: Final = 3
"""Errors of a group that a message names."""


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
        super().__init__(f"child {child_id!r} failed to start: {_text(cause)}")
        self.child_id = child_id
        self.cause = cause


class StartTimeout(SupervisionError):
    """A child was not ready within its time limit.

    Raised by: nobody as such; it is the `cause` of a `StartFailed` or a `RestartLimitReached`.
    Remedy: find out what the child waits for, or allow more time by its ``start_timeout``.
    """

    def __init__(self, child_id: str, seconds: float) -> None:
        super().__init__(f"{child_id!r} was not ready within {seconds:g} s")


class StartDeadlock(SupervisionError):
    """A child asked, before it was ready, for a start that comes only after its own.

    Raised by: `Supervisor.start_child` and `Supervisor.restart_child`, called by one of the children with
    which the supervisor begins.
    Remedy: call ``task_status.started()`` first, or start the other child from a task beside the child's own.
    """

    def __init__(self, supervisor: str, child_id: str) -> None:
        super().__init__(
            f"child {child_id!r} cannot have supervisor {supervisor!r} start a child before it is ready "
            "itself, because that start comes after its own: call task_status.started() first"
        )


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
        last = f"child {child_id!r}: {_text(cause)}" if child_id else _text(cause)
        super().__init__(
            f"supervisor {supervisor!r}: more than {intensity:g} restarts within {period:g} s; "
            f"last cause: {last}"
        )
        self.cause = cause
        self.child_id = child_id


class ProcessFailed(SupervisionError):
    """A process that is a child ended with an exit code or by a signal that is no normal end.

    Raised by: a child made by `ChildSpec.process`; it is the cause of what its supervisor raises and reports.
    Remedy: see what the process has written, in the log; name its code in ``exit_codes`` if that is normal.

    Args:
        child_id: the child.
        how: how it ended.
        returncode: its exit code, or minus the number of the signal that ended it.
    """

    def __init__(self, child_id: str, how: str, returncode: int | None) -> None:
        super().__init__(f"the process of child {child_id!r} {how}")
        self.returncode = returncode


class JobLost(SupervisionError):
    """A job of a pool was given up, because too many processes were lost with it.

    Raised by: `Pool.ask`.
    Remedy: see in `cause` and in the log what ended them; a job that ends each process is not tried again.

    Args:
        pool: the pool's id.
        losses: how many processes were lost with the job.
        cause: why the last one ended.
    """

    def __init__(self, pool: str, losses: int, cause: BaseException) -> None:
        times = "once" if losses == 1 else f"{losses} times"
        super().__init__(f"a job of pool {pool!r} lost its process {times}; last cause: {_text(cause)}")
        self.losses = losses
        self.cause = cause


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


class TooManyChildren(SupervisionError):
    """A supervisor has as many children as it may have.

    Raised by: `Supervisor.start_child`.
    Remedy: wait until one is gone, delete one that is stopped, or allow more by ``max_children``.
    """

    def __init__(self, supervisor: str, most: float) -> None:
        super().__init__(f"supervisor {supervisor!r} already has {most:g} children, its max_children")


class NameNotFound(SupervisionError, LookupError):
    """No child of this name is up.

    Raised by: `whereis` and `Supervisor.whereis`.
    Remedy: wait until the child is ready, also when it is being restarted; give its `ChildSpec` the name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"no child named {name!r} is up")


class NameTaken(SupervisionError):
    """Two children of one tree have the same name.

    Raised by: ``task_status.started``, in the child that comes later.
    Remedy: give one of them another name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"the name {name!r} is taken by another child")


class NoState(SupervisionError):
    """A child has published no state.

    Raised by: `Supervisor.get_state`.
    Remedy: call `publish_state` in the child.
    """

    def __init__(self, child_id: str) -> None:
        super().__init__(f"child {child_id!r} has published no state")


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


def _text(cause: BaseException | None) -> str:
    """Return what an exception says, with the name of its class where that alone would not say what it is."""
    if cause is None:
        return "unknown"
    cause = root_cause(cause)
    message = str(cause).strip()
    if not message or isinstance(cause, BaseExceptionGroup | KeyError):  # a key alone says nothing
        return describe(cause)
    return message


def describe(error: BaseException) -> str:
    """Return one line: the class of the error and the first line of its message; of a group, its errors'."""
    error = root_cause(error)
    message = str(error).strip().partition("\n")[0]
    if isinstance(error, BaseExceptionGroup):
        message = "; ".join(map(describe, error.exceptions[:SHOWN]))
        if len(error.exceptions) > SHOWN:
            message += f"; and {len(error.exceptions) - SHOWN} more"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
