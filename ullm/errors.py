"""Every error that ullm raises on purpose.

The name of an error tells whose doing it is: ``Invalid…`` and ``…NotFound`` are the caller's, ``…Closed`` is
something that you ended yourself, ``…Lost`` and ``…Broken`` are the other side's. Constructors build the
message, so that every message names the cause and, where there is one, the remedy.

The errors of `ullm.supervision`, which is a library of its own, can be imported from here as well. Their base
is `SupervisionError`, not `UllmError`. They are loaded when they are first used, because they bring trio
with them, which worker processes do without.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullm.supervision.errors import ActorLost as ActorLost
    from ullm.supervision.errors import AskTimeout as AskTimeout
    from ullm.supervision.errors import ChildConflict as ChildConflict
    from ullm.supervision.errors import ChildNotFound as ChildNotFound
    from ullm.supervision.errors import MailboxClosed as MailboxClosed
    from ullm.supervision.errors import MailboxFull as MailboxFull
    from ullm.supervision.errors import RestartLimitReached as RestartLimitReached
    from ullm.supervision.errors import StartFailed as StartFailed
    from ullm.supervision.errors import StartTimeout as StartTimeout
    from ullm.supervision.errors import SupervisionError as SupervisionError
    from ullm.supervision.errors import first_cause as first_cause

__all__ = [
    "ActorLost",
    "AdapterUnusable",
    "AskTimeout",
    "ChildConflict",
    "ChildNotFound",
    "ConfigError",
    "EngineBusy",
    "EngineDead",
    "EngineDraining",
    "EngineForked",
    "EngineNotReady",
    "EngineSleeping",
    "EngineStopped",
    "FaultInjected",
    "FrameBroken",
    "GrammarTooComplex",
    "HandshakeRefused",
    "InvalidParameter",
    "LifespanMissing",
    "LinkLost",
    "LinkRefused",
    "MailboxClosed",
    "MailboxFull",
    "MigrationLimitReached",
    "ModelError",
    "ModelFileBroken",
    "ModelNotFound",
    "ModelUnknown",
    "ModelUnsupported",
    "NoTokenAllowed",
    "OutOfMemory",
    "PortTaken",
    "PromptTooLong",
    "QueueFull",
    "ReloadFailed",
    "RequestError",
    "RequestPoisoned",
    "RequestTooLarge",
    "ResourceUnavailable",
    "RestartLimitReached",
    "ServerRefused",
    "ServerUnreachable",
    "StartCancelled",
    "StartFailed",
    "StartTimeout",
    "SupervisionError",
    "TemplateFailed",
    "TooManyTokens",
    "UllmError",
    "UsageError",
    "WorkerFailed",
    "WorkerLost",
    "first_cause",
    "one_line",
]

_OF_SUPERVISION = frozenset(
    {
        "ActorLost",
        "AskTimeout",
        "ChildConflict",
        "ChildNotFound",
        "MailboxClosed",
        "MailboxFull",
        "RestartLimitReached",
        "StartFailed",
        "StartTimeout",
        "SupervisionError",
        "first_cause",
    }
)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _OF_SUPERVISION:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from ullm.supervision import errors

        return getattr(errors, name)


class UllmError(Exception):
    """An operation of ullm failed for a known reason.

    Raised by: nobody as such; it is the base of all errors of ullm but those of `ullm.supervision`.
    Remedy: catch one of its subclasses where one of them can be handled.
    """


# --- the caller's doing ------------------------------------------------------------------------


class ConfigError(UllmError, ValueError):
    """The command line, a variable or the configuration file is wrong; ends a command with exit code 2.

    Raised by: `EngineConfig`, `ServerConfig` and the command line.
    Remedy: set the option that the message names to a value that it allows.
    """


class ResourceUnavailable(ConfigError):
    """An option asks for what is not there, or not usable; ends a command with exit code 1.

    Such as a file that cannot be read, an address that this machine does not have, a device, a library that
    is not installed, or a computation that there is no kernel for.

    Raised by: the server as it starts, and a worker whose device or model does not fit the configuration.
    Remedy: provide it, or change the option that the message names.
    """


class RequestError(UllmError):
    """One request cannot be served.

    It carries what an OpenAI error body needs: ``status``, ``type``, ``code``, ``message`` and ``param``.

    Raised by: the engine and the server, mostly as one of its subclasses.
    Remedy: the message names it.

    Args:
        message: one line for the user.
        param: name of the request field at fault, if there is one.
    """

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def rename_field(self, known: str, sent: str) -> None:
        """Name the field as the client has sent it, where it has several names."""
        if self.param == known:
            self.param = sent
        self.message = re.sub(rf"(?<![\w-]){known}(?![\w-])", sent, self.message)
        self.args = (self.message,)


class InvalidParameter(RequestError, ValueError):
    """A request field or a sampling parameter has a value that cannot be used.

    Raised by: `SamplingParams`, the engine and the server, before the request is queued.
    Remedy: correct the field that ``param`` and the message name.
    """

    code = "invalid_value"


class PromptTooLong(RequestError):
    """The prompt does not leave room for one generated token.

    Raised by: the tokenizer and the engine, before the request is queued.
    Remedy: shorten the prompt, or start with a larger ``--context-len`` if the model allows it.

    The message begins as OpenAI's does, because clients look for these words.

    Args:
        prompt_tokens: tokens of the prompt.
        context_len: tokens that prompt and generated text may have together.
        param: name of the request field at fault.
        at_least: whether the prompt may have even more tokens; it was not encoded to its end.
    """

    code = "context_length_exceeded"

    def __init__(
        self, prompt_tokens: int, context_len: int, param: str = "prompt", *, at_least: bool = False
    ) -> None:
        super().__init__(
            f"This model's maximum context length is {context_len} tokens. However, the prompt has "
            f"{'at least ' if at_least else ''}{prompt_tokens} tokens, which leaves no room for a generated "
            "one; shorten the prompt",
            param,
        )


class ModelUnknown(RequestError):
    """The request names a model that this server does not serve.

    Raised by: the server.
    Remedy: use a name from ``GET /v1/models``, or start the server with ``--served-model-name``.
    """

    status = 404
    code = "model_not_found"

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"the model {name!r} is not served here; this server serves {served}", "model")


class AdapterUnusable(RequestError):
    """A LoRA adapter cannot be loaded, or its files have changed or gone since it was.

    Raised by: the engine, when an adapter is loaded, and for requests that need one which can no longer be.
    Remedy: correct what the message names; or unload the adapter, and load it again.
    """

    code = "adapter_unusable"

    def __init__(self, cause: str) -> None:
        super().__init__(cause, "model")


class QueueFull(RequestError):
    """The waiting queue is full.

    Raised by: the engine, when ``--max-queue`` requests are waiting.
    Remedy: try again after ``retry_after`` seconds, add replicas, or raise ``--max-queue``.
    """

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, waiting: int, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(f"{waiting} requests are waiting and --max-queue is {limit}; try again later")
        self.retry_after = retry_after


class EngineDraining(RequestError):
    """The engine is stopping and takes no new requests.

    Raised by: the engine, from the request to stop on.
    Remedy: send the request to another server, or to this one when it has been started again.
    """

    status = 503
    type = "service_unavailable"
    code = "draining"
    retry_after = 5.0

    def __init__(self, state: str = "draining") -> None:
        super().__init__(f"the server is {state} and takes no new requests; send it to another one")


class EngineNotReady(RequestError):
    """The engine is starting, asleep, or restarting a part of itself, and cannot take the request now.

    Raised by: the engine and its tokenizer.
    Remedy: try again after ``retry_after`` seconds; wait for ``GET /ready`` before the first request.
    """

    status = 503
    type = "service_unavailable"
    code = "not_ready"
    retry_after = 1.0

    def __init__(self, state: str) -> None:
        super().__init__(f"the engine is {state}; try again later")


class LifespanMissing(RequestError):
    """The ASGI application was called, but nobody has run its lifespan, which starts the engine.

    Raised by: ``ullm.app``, below an application that does not forward the lifespan, or a server without one.
    Remedy: put ``ullm.app.app.lifespan`` into the outer application's lifespan; see docs/how-to/hosting.md.
    """

    status = 503
    type = "service_unavailable"
    code = "no_lifespan"

    def __init__(self) -> None:
        super().__init__(
            "the engine was never started: the server or the application around ullm.app does not run its "
            "lifespan; use FastAPI(lifespan=ullm.app.app.lifespan), or enter that in a lifespan of your own"
        )


class EngineSleeping(EngineNotReady):
    """The engine is asleep, and requests do not wake it.

    Raised by: the engine, if it was started with ``--no-wake-on-request``.
    Remedy: wake it with ``POST /wake_up``, or start it without that option.
    """

    code = "sleeping"

    def __init__(self) -> None:
        super().__init__("asleep, and started with --no-wake-on-request")


class TooManyTokens(RequestError):
    """The admitted requests already need as many tokens as are allowed.

    Raised by: the engine, when ``--max-admitted-tokens`` would be exceeded.
    Remedy: try again after ``retry_after`` seconds, ask for fewer tokens, or raise the option.

    Args:
        admitted: tokens that the admitted requests need.
        needed: tokens that this request may need.
        limit: the most that may be admitted.
    """

    status = 429
    type = "rate_limit_error"
    code = "too_many_tokens"

    def __init__(self, admitted: int, needed: int, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(
            f"this request may need {needed} tokens, the admitted ones need {admitted}, and "
            f"--max-admitted-tokens is {limit}; try again later"
        )
        self.retry_after = retry_after


class EngineBusy(RequestError):
    """Another change of the whole engine, a sleep, a wake, a reload or a stop, is under way or came first.

    Raised by: the engine, when it is told to sleep, to wake up or to reload.
    Remedy: wait until the other change is done; ``GET /health`` shows it.
    """

    status = 409
    type = "conflict_error"
    code = "engine_busy"


class ReloadFailed(RequestError):
    """The new model cannot be used, or the new workers did not come up; the old ones continue to serve.

    Raised by: the engine, on a reload.
    Remedy: remove the cause, which the message and the log name, and reload again.
    """

    status = 500
    type = "server_error"
    code = "reload_failed"


class MigrationLimitReached(RequestError):
    """The workers of this request were lost more often than ``--migration-limit`` lets it go on elsewhere.

    Raised by: the engine.
    Remedy: send the request again; raise the option, or find out from the log why workers are lost.

    Args:
        losses: how often it has lost its workers.
    """

    status = 503
    type = "service_unavailable"
    code = "migration_limit"
    retry_after = 1.0

    def __init__(self, losses: int, limit: int) -> None:
        super().__init__(
            f"the workers of this request were lost {losses} time{'s' if losses > 1 else ''}, and "
            f"--migration-limit is {limit}; send it again"
        )


class RequestPoisoned(RequestError):
    """This request crashed its workers each time it ran, so it was given up; other requests were not.

    Raised by: the engine.
    Remedy: do not send it again; report it with the worker's last lines from the log.
    """

    status = 500
    type = "server_error"
    code = "poisoned"

    def __init__(self, request_id: str, attempts: int) -> None:
        super().__init__(f"request {request_id} crashed its worker {attempts} times and was given up")


class RequestTooLarge(RequestError):
    """The parameters of this request cannot be sent to a worker: they are too large, or are no plain values.

    Raised by: the engine, before the first step of the request.
    Remedy: shorten the parameter that the message names.
    """

    code = "request_too_large"


class TemplateFailed(RequestError):
    """The model's chat template fails for every conversation, even the simplest; completions work without it.

    Raised by: the tokenizer, before the request is queued.
    Remedy: start the server with ``--chat-template FILE``, or use ``/v1/completions``.

    Args:
        cause: one line.
    """

    status = 500
    type = "server_error"
    code = "template_failed"

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"the model's chat template fails for every conversation: {cause}; use /v1/completions, or "
            "start the server with --chat-template FILE",
            "messages",
        )


class GrammarTooComplex(RequestError):
    """The grammar of this request needs more work for one token than is allowed, so its answer was given up.

    Raised by: the engine, while the answer is generated.
    Remedy: simplify the schema or grammar, above all repetitions within repetitions.
    """

    status = 400
    type = "invalid_request_error"
    code = "grammar_too_complex"

    def __init__(self, cause: str) -> None:
        super().__init__(f"the grammar is too complex to go on: {cause}", "structured_outputs")


class NoTokenAllowed(RequestError):
    """Of the tokens that this request allows none may come next, so its answer was given up.

    Raised by: the engine, while the answer is generated.
    Remedy: allow more tokens: shorten ``bad_words``, or let ``allowed_token_ids`` and the form of the answer
    agree.
    """

    status = 400
    type = "invalid_request_error"
    code = "no_token_allowed"
    CAUSE = "none of the tokens that the request allows may come next"

    def __init__(self) -> None:
        super().__init__(f"{self.CAUSE}; shorten bad_words, or allow more tokens", "allowed_token_ids")


class EngineDead(RequestError):
    """The engine failed for good; the message is the first cause in one line. Exit code 70.

    Raised by: the engine, when its parts failed more often than ``--max-restarts`` allows.
    Remedy: remove the cause and start again; a service manager should restart the process.
    """

    status = 500
    type = "server_error"
    code = "engine_dead"


class EngineStopped(EngineDead):
    """The program has shut its own engine down, and asks it for something.

    Raised by: `LLM`, after its ``shutdown()``, and its streams that had not ended before.
    Remedy: none is needed; make another `LLM` to generate more.
    """

    status = 503
    type = "service_unavailable"
    code = "engine_stopped"

    def __init__(self) -> None:
        super().__init__("the engine was stopped: this program has shut it down")


class EngineForked(EngineDead):
    """The program was forked after it had made its engine, which the child cannot use.

    Raised by: `LLM` in a child of ``os.fork`` or of multiprocessing's ``fork``, at any use.
    Remedy: make the `LLM` after the fork, in the process that uses it; gunicorn: without ``--preload``.
    """

    code = "engine_forked"

    def __init__(self) -> None:
        super().__init__(
            "this process was forked from the one whose engine this is; make the LLM after the fork, in each "
            "process that uses one"
        )


# --- the model ---------------------------------------------------------------------------------


class ModelError(UllmError):
    """The model cannot be loaded; ends a command with exit code 1 and one line.

    Raised by: the loading of a model, as one of its subclasses.
    Remedy: the message names it.
    """


class ModelNotFound(ModelError):
    """There is no such folder, file, or hub repository, or the hub cannot be reached.

    Raised by: the search for the model's files.
    Remedy: check ``--model`` and ``--revision``, the network, and HF_TOKEN for gated models.
    """


class ModelFileBroken(ModelError):
    """A weight or config file is truncated, unreadable, or disagrees with the config.

    Raised by: the search for the model's files, and the loading of weights and tokenizer.
    Remedy: fetch the file again, with ``ullm pull`` for models of a hub.

    Args:
        file: path of the file.
        detail: what is wrong with it; names the tensor and both shapes where one is at fault.
    """

    def __init__(self, file: object, detail: str) -> None:
        super().__init__(f"{file}: {detail}")


class ModelUnsupported(ModelError):
    """The architecture, quantization, or file format is one that ullm cannot run.

    Raised by: the loading of a model.
    Remedy: choose another model, or another format of this one.
    """


class OutOfMemory(ModelError):
    """The device cannot hold the weights, or not even one block of KV cache.

    Raised by: a worker, as it loads the model.
    Remedy: free memory, choose a smaller or quantized model, or lower ``--context-len``.
    """


# --- workers -----------------------------------------------------------------------------------


class WorkerLost(UllmError):
    """A worker died, was killed, or stopped answering.

    Raised by: the transports, to the engine, which restarts the worker and runs its requests again.
    Remedy: none is needed once; if it repeats, the cause and the worker's last lines are in the log.

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
    """A worker reported an exception of its own and ended.

    Raised by: the engine's side of a worker, to the engine, which restarts the worker.
    Remedy: as for `WorkerLost`; the traceback is in the log at level debug.
    """


class FrameBroken(UllmError):
    """The bytes on a worker's pipe are not a frame, or a message cannot be made one.

    Raised by: the reader of a pipe between engine and worker, which cannot be used any further; and the
        sender, which has sent nothing then.
    Remedy: none is needed once, since the worker is replaced; a library that prints to the worker's
        pipe may be the reason.
    """


class HandshakeRefused(UllmError):
    """Engine and agent, or engine and front end, do not let each other in.

    Raised by: the end that finds that the secrets or the releases differ; both log it.
    Remedy: the same release on every host, and the same file of ``--node-secret-file``.
    """


class LinkLost(UllmError):
    """The connection between an engine and an agent on another host, or a front end, is gone.

    Raised by: either end. With an agent the engine loses that host's workers, which the agent ends; a front
        end connects again, and its requests go on.
    Remedy: none is needed once; the log has the cause. See docs/how-to/several-hosts.md and
        docs/how-to/front-ends.md.
    """


class LinkRefused(UllmError):
    """The engine does not let this front end in, or the front end does not trust it.

    Raised by: a front end, as it starts; one that runs logs it, and tries again.
    Remedy: the message names it: the same version of ullm, and the same key, on both sides.

    Args:
        address: where the engine listens.
        reason: one line.
    """

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"{address}: {reason}")


class FaultInjected(UllmError):
    """A fault plan asked for this error.

    Raised by: the fault points, if ``--faults`` or ``POST /admin/faults`` armed them.
    Remedy: clear the faults; see docs/how-to/fault-injection.md.
    """

    def __init__(self, where: str) -> None:
        super().__init__(f"injected fault: {where}")


# --- start, command line and client ------------------------------------------------------------


class StartCancelled(UllmError):
    """A stop was asked for before the engine had started; nothing is left of it.

    Raised by: `open_engine`.
    Remedy: none is needed.
    """

    def __init__(self) -> None:
        super().__init__("stopped while starting")


class PortTaken(UllmError):
    """The address on which the server should listen is in use; ends a command with exit code 1.

    Raised by: the server, as it starts.
    Remedy: stop the other program, or choose another ``--port``.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port} is already in use; stop what listens there or choose another --port")


class UsageError(UllmError):
    """The command line does not say what to do; ends a command with exit code 2.

    Raised by: the commands.
    Remedy: the message names it; ``--help`` lists the options.
    """


class ServerUnreachable(UllmError):
    """No server answers at a URL, or it closed the connection in the middle.

    Raised by: ``ullm chat --url``, ``ullm generate --url`` and ``ullm bench serve``.
    Remedy: start a server with ``ullm serve``, or correct the URL.
    """

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"{url}: {cause.rstrip('.')}; is a server running there? (ullm serve starts one)")


class ServerRefused(UllmError):
    """A server answered a request with an error.

    Raised by: ``ullm chat --url``, ``ullm generate --url`` and ``ullm bench serve``.
    Remedy: the server's message names it.

    Args:
        status: the HTTP status; 200 for an error inside a stream.
    """

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url} answered {status}: {message}")
        self.status = status


def one_line(error: BaseException) -> str:
    """Return the first line of the error's message, or the name of its class if there is no message.

    A line that ends with a colon goes on with the next one.
    """
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        return f"{lines[0].rstrip()} {lines[1].strip()}"
    return lines[0].rstrip() if lines else type(error).__name__
