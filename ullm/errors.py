"""Every error that ullm raises on purpose.

Names say who did it: ``Invalid…`` and ``…NotFound`` are the caller's doing, ``…Closed`` is something
you ended yourself, ``…Lost`` and ``…Broken`` are the other side's doing. Constructors build the
message, so that every message names the cause and, where there is one, the remedy.
"""

from __future__ import annotations


class UllmError(Exception):
    """Base of all of ullm's errors."""


# --- what the caller did -----------------------------------------------------------------------


class ConfigError(UllmError, ValueError):
    """The configuration cannot work; names the option and what to set it to. Exit code 1."""


class RequestError(UllmError):
    """One request cannot be served; carries what an OpenAI error body needs.

    Args:
        message: one line for the user.
        param: the name of the offending request field, if there is one.
    """

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidParameter(RequestError, ValueError):
    """A request field or a sampling parameter has a value that cannot be used."""

    code = "invalid_value"


class PromptTooLong(RequestError):
    """The prompt does not leave room for one generated token."""

    code = "context_length_exceeded"

    def __init__(
        self, prompt_tokens: int, context_len: int, param: str = "prompt", *, at_least: bool = False
    ) -> None:
        super().__init__(
            f"the prompt has {'at least ' if at_least else ''}{prompt_tokens} tokens, "
            f"the model's context is {context_len} tokens and must "
            "also hold at least one generated token; shorten the prompt",
            param,
        )


class ModelUnknown(RequestError):
    """The request names a model that this server does not serve."""

    status = 404
    code = "model_not_found"

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"the model {name!r} is not served here; this server serves {served!r}", "model")


class QueueFull(RequestError):
    """The waiting queue is full; try again after ``retry_after`` seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, waiting: int, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(f"{waiting} requests are waiting and --max-queue is {limit}; try again later")
        self.retry_after = retry_after


class EngineDraining(RequestError):
    """The engine is stopping and takes no new requests."""

    status = 503
    type = "service_unavailable"
    code = "draining"
    retry_after = 5.0

    def __init__(self, state: str = "draining") -> None:
        super().__init__(f"the server is {state} and takes no new requests; send it to another one")


class EngineNotReady(RequestError):
    """The engine is starting, asleep, or restarting, and cannot take the request now."""

    status = 503
    type = "service_unavailable"
    code = "not_ready"
    retry_after = 1.0

    def __init__(self, state: str) -> None:
        super().__init__(f"the engine is {state}; try again later")


class EngineSleeping(EngineNotReady):
    """The engine is asleep, and requests do not wake it."""

    code = "sleeping"

    def __init__(self) -> None:
        super().__init__("asleep, and started with --no-wake-on-request")


class TooManyTokens(RequestError):
    """The admitted requests have as many tokens as there may be; try again later."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_tokens"

    def __init__(self, admitted: int, asked: int, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(
            f"this request may need {asked} tokens, the admitted ones need {admitted}, and "
            f"--max-admitted-tokens is {limit}; try again later"
        )
        self.retry_after = retry_after


class EngineBusy(RequestError):
    """Another change of the whole engine, a sleep, a wake or a reload, is under way or overtook this one."""

    status = 409
    type = "conflict_error"
    code = "engine_busy"


class ReloadFailed(RequestError):
    """The new workers did not come up; the old ones serve on."""

    status = 500
    type = "server_error"
    code = "reload_failed"


class RequestPoisoned(RequestError):
    """This request crashed its workers each time it ran, so it was given up; others were not."""

    status = 500
    type = "server_error"
    code = "poisoned"

    def __init__(self, request_id: str, attempts: int) -> None:
        super().__init__(f"request {request_id} crashed its worker {attempts} times and was given up")


class EngineDead(RequestError):
    """The engine failed for good; the message is the first cause in one line."""

    status = 500
    type = "server_error"
    code = "engine_dead"


# --- the model ---------------------------------------------------------------------------------


class ModelError(UllmError):
    """The model cannot be loaded. Exit code 1, one line, no traceback."""


class ModelNotFound(ModelError):
    """No such folder, file, or hub repository."""


class ModelFileBroken(ModelError):
    """A weight or config file is truncated, unreadable, or disagrees with the config.

    Args:
        file: the file's path.
        detail: what is wrong with it; names the tensor and both shapes where one is at fault.
    """

    def __init__(self, file: object, detail: str) -> None:
        super().__init__(f"{file}: {detail}")


class ModelUnsupported(ModelError):
    """The architecture, quantization, or file format is one that ullm cannot run."""


class OutOfMemory(ModelError):
    """The device cannot hold the weights, or not even one block of KV cache."""


# --- actors, workers and supervision -----------------------------------------------------------


class MailboxClosed(UllmError):
    """You closed this mailbox, or its actor has ended; nothing more can be sent to it."""


class MailboxFull(UllmError):
    """A bounded mailbox had no room for a message sent without waiting."""


class AskTimeout(UllmError):
    """The actor did not answer before the deadline."""


class ActorLost(UllmError):
    """The actor ended before it answered."""


class WorkerLost(UllmError):
    """A worker died, was killed, or stopped answering.

    Args:
        name: the worker's name, as in ``replica0.rank0``.
        cause: one line: exit status or signal, or how it hung.
        stderr_tail: the last lines that it wrote to stderr.
    """

    def __init__(self, name: str, cause: str, stderr_tail: tuple[str, ...] = ()) -> None:
        super().__init__(f"{name} {cause}")
        self.name = name
        self.cause = cause
        self.stderr_tail = stderr_tail


class WorkerFailed(WorkerLost):
    """A worker reported an exception of its own and ended."""


class FrameBroken(UllmError):
    """Bytes on a worker's pipe are not a frame; the pipe cannot be used any further."""


class FaultInjected(UllmError):
    """A fault plan asked for this error; see docs/fault-injection.md."""

    def __init__(self, where: str) -> None:
        super().__init__(f"injected fault: {where}")


class StartFailed(UllmError):
    """A supervised child failed before it was ready."""

    def __init__(self, child_id: str, cause: BaseException) -> None:
        super().__init__(f"child {child_id!r} failed to start: {cause}")
        self.child_id = child_id
        self.cause = cause


class StartCancelled(UllmError):
    """A stop was asked for before the engine had started; nothing is left of it."""

    def __init__(self) -> None:
        super().__init__("stopped while starting")


class RestartLimitReached(UllmError):
    """A supervisor's children failed more often than its intensity allows.

    Args:
        supervisor: the supervisor's id.
        intensity: restarts allowed within one period.
        period: seconds.
        cause: what ended the child the last time.
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


class ChildNotFound(UllmError, LookupError):
    """The supervisor has no child of this id."""

    def __init__(self, supervisor: str, child_id: str) -> None:
        super().__init__(f"supervisor {supervisor!r} has no child {child_id!r}")


class ChildConflict(UllmError):
    """The child's status does not allow what was asked for; terminate or delete it first.

    Args:
        status: as in `ullm.supervision.ChildStatus`.
    """

    def __init__(self, supervisor: str, child_id: str, status: str) -> None:
        super().__init__(f"child {child_id!r} of supervisor {supervisor!r} exists and is {status}")
        self.status = status


class PortTaken(UllmError):
    """The address that the server should listen on is in use. Exit code 1."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port} is already in use; stop what listens there or choose another --port")


class UsageError(UllmError):
    """The command line does not say what to do. Exit code 2."""


class ServerUnreachable(UllmError):
    """No server answers at a URL, or it hung up in the middle."""

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"{url}: {cause}; is a server running there? (ullm serve starts one)")


class ServerRefused(UllmError):
    """A server answered a request with an error.

    Args:
        status: the HTTP status; 200 for an error inside a stream.
    """

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url} answered {status}: {message}")
        self.status = status


class ShutdownForced(UllmError):
    """A stop was escalated: what had not stopped was killed or abandoned."""


def first_cause(error: BaseException) -> BaseException:
    """What went wrong first, without the groups and supervisors that it passed through.

    Of a group that is the first real error; the cancellations beside it are its consequences.
    """
    while True:
        if isinstance(error, BaseExceptionGroup):
            inner: list[BaseException] = list(error.exceptions)
            error = next((one for one in inner if isinstance(one, Exception)), inner[0])
        elif isinstance(error, StartFailed | RestartLimitReached) and error.cause is not None:
            error = error.cause
        else:
            return error
