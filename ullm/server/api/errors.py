"""Errors as OpenAI's body, with their status and headers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping

import msgspec
from quart import Response, current_app, g, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from ullm.errors import (
    ActorLost,
    AskTimeout,
    EngineDraining,
    EngineNotReady,
    InvalidParameter,
    RequestError,
)
from ullm.logs import get_logger
from ullm.server.api.message_errors import is_messages, message_error_body, message_status
from ullm.server.api.responses import ErrorBody, ErrorDetail
from ullm.supervision import root_cause

log = get_logger(__name__)

MAX_PATH = 100
"""Characters of a path that an error shows."""

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
_FIELD = re.compile(r"field `(?P<field>[^`]+)`")


class Unauthorized(RequestError):
    """The API key is missing or wrong.

    Raised by: the server, if it was started with ``--api-key`` or ``--api-key-file``.
    Remedy: send ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY``.
    """

    status = 401
    code = "invalid_api_key"


class AdminUnauthorized(Unauthorized):
    """The admin key is missing or wrong.

    Raised by: the admin endpoints, if the server was started with ``--admin-key``.
    Remedy: send ``Authorization: Bearer KEY`` with that key; the API key does not open them.
    """

    code = "invalid_admin_key"


class AdminDisabled(RequestError):
    """The admin endpoints are closed.

    Raised by: the admin endpoints on the API's port, if there is no admin key.
    Remedy: start the server with ``--admin-key``, or with ``--admin-listen`` and ask there.
    """

    status = 403
    code = "admin_disabled"

    def __init__(self) -> None:
        super().__init__(
            "the admin endpoints are closed here; start the server with --admin-key KEY and send "
            "'Authorization: Bearer KEY', or with --admin-listen unix:PATH and send the request there"
        )


class ForeignOrigin(RequestError):
    """A web page of somebody else has had its visitor's browser send the request.

    Raised by: a server on loopback without API keys, for origins that are neither its own nor among
    ``--cors-origins``; the listener of ``--admin-listen``, for any origin and for foreign host names.
    Remedy: name the page's origin in ``--cors-origins``. For the admin listener, use a client that is no
    browser, and address it as localhost or by its address.
    """

    status = 403
    code = "foreign_origin"


class ForeignHost(RequestError):
    """The request calls the server by a name that is not its own, as pages do that rebind a name.

    Raised by: a server on loopback without API keys, and any server with ``--allowed-hosts``.
    Remedy: address it as localhost or by its address, or name the host in ``--allowed-hosts``.
    """

    status = 403
    code = "foreign_host"


class AnswerUnknown(RequestError):
    """No answer of this id is stored, or another key asked for it.

    Raised by: the server.
    Remedy: ask again; answers are kept for ``--stored-answer-hours``, and at most ``--max-stored-answers``.
    """

    status = 404
    code = "response_not_found"

    def __init__(self, id: str) -> None:
        super().__init__(f"no answer {id!r} is stored for this key")


class AnswersNotKept(RequestError):
    """A front end with ``--connect`` keeps no answers, because the next request may reach another one.

    Raised by: the server, for ``background``, ``store: true``, ``previous_response_id``, stored responses.
    Remedy: ask with ``store: false`` and send the whole conversation, or start front ends with ``--answers``.
    """

    code = "answers_not_kept"

    def __init__(self) -> None:
        super().__init__(
            "this front end keeps no answers, and was not told by --answers who does; send the whole "
            "conversation, without background and store",
            "store",
        )


class AnswersAway(RequestError):
    """The process that keeps the stored answers of front ends is not there.

    Raised by: a front end, for requests that concern stored answers.
    Remedy: try again after ``retry_after`` seconds; by hand, start it: ``--answers-listen``.
    """

    status = 503
    type = "service_unavailable"
    code = "answers_away"
    retry_after = 1.0

    def __init__(self, cause: object) -> None:
        super().__init__(f"the process that keeps stored answers is away ({cause}); try again later")


class AnswerNotDurable(RequestError):
    """The answer cannot be written to the journal, and was asked for as one that survives the process.

    Raised by: the server.
    Remedy: free space where ``--journal`` is, delete stored responses, or ask without ``background``.
    """

    status = 503
    type = "server_error"
    code = "journal_full"

    def __init__(self, cause: object) -> None:
        super().__init__(f"the answer cannot be written to the journal: {cause}")


class ServedChanged(RequestError):
    """An unfinished answer cannot go on: another model, arithmetic or release began it.

    Raised by: the server, for answers of an earlier run.
    Remedy: ask again.
    """

    status = 409
    code = "model_changed"

    def __init__(self, then: str, now: str) -> None:
        super().__init__(f"the answer was begun by {then}; this is {now}, which would go on otherwise")


class AnswerInterrupted(RequestError):
    """The server stops, or the process that keeps stored answers has ended; they go on after its next start.

    Raised by: the server, as the last event of a stream.
    Remedy: ask for the rest with ``GET /v1/responses/ID?stream=true&starting_after=N``, or the same below
    ``/v1/chat/completions/ID``, ``/v1/completions/ID`` or ``/v1/messages/ID``.
    """

    status = 503
    type = "server_error"
    code = "interrupted"

    def __init__(self, message: str = "the server stops; the answer goes on after its next start") -> None:
        super().__init__(message)


class CutShort(RequestError):
    """The request ended before it was computed, and a part of such an answer is of no use.

    Raised by: the server, for embeddings, scores and rankings.
    Remedy: ask again, with a longer ``X-Request-Timeout`` if that was the cause.
    """

    status = 503
    type = "server_error"
    code = "cut_short"

    def __init__(self, reason: str | None) -> None:
        super().__init__(f"the request ended before all of it was computed: {reason}")


class UnsupportedMediaType(RequestError):
    """The content type of the body is not JSON, or missing.

    Raised by: the server.
    Remedy: send ``Content-Type: application/json``.
    """

    status = 415
    code = "unsupported_media_type"


class HttpVersionRefused(RequestError):
    """The request is of a version of HTTP that the server does not speak.

    Raised by: the server, which speaks HTTP/1.1, and HTTP/2 if it was started with ``--http2``.
    Remedy: use HTTP/1.1, or start the server with ``--http2``.
    """

    status = 505
    code = "http_version_not_supported"

    def __init__(self, version: str) -> None:
        super().__init__(f"HTTP/{version} is not spoken here; use HTTP/1.1, or start the server with --http2")


class InvalidJSON(RequestError):
    """The body is not valid JSON.

    Raised by: the server.
    Remedy: correct the body; the message says where it breaks off.
    """

    code = "invalid_json"


def invalid_field(error: msgspec.ValidationError) -> InvalidParameter:
    """Return the error for a JSON value of the wrong type; names its place: ``messages[0].role``."""
    text = str(error)
    place = _PATH.search(text)
    message = _PATH.sub("", text)
    path = place["path"].replace("[...]", "") if place else ""  # msgspec does not name an object's keys
    missing = _FIELD.search(message)
    if missing:
        path = f"{path}.{missing['field']}".lstrip(".")
    return InvalidParameter(f"{path}: {message}" if path else message, path or None)


def error_body(error: RequestError) -> bytes:
    """Return OpenAI's JSON for an error."""
    detail = ErrorDetail(error.message, error.type, error.param, error.code)
    return msgspec.json.encode(ErrorBody(detail))


def error_headers(error: RequestError) -> dict[str, str]:
    """Return ``Retry-After`` where a retry makes sense, and other headers that the status requires."""
    headers = {}
    retry_after: float | None = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["Retry-After"] = str(math.ceil(retry_after))
        headers["Retry-After-Ms"] = str(math.ceil(retry_after * 1000))  # OpenAI's clients prefer it
    if isinstance(error, EngineDraining) or error.status in (408, 413):
        headers["Connection"] = "close"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response for an error, in the form of the API that the current request's path belongs to."""
    headers = {**error_headers(error), **(headers or {})}
    if is_messages(request.path):
        name = getattr(g, "request_id", None)
        return Response(
            message_error_body(error, name),
            status=message_status(error.status),
            headers={**headers, **({"request-id": name} if name else {})},
            content_type="application/json",
        )
    return Response(
        error_body(error),
        status=error.status,
        headers=headers,
        content_type="application/json",
    )


def internal_error(error: BaseException) -> RequestError:
    """Log a bug or a failure of the engine; return an error that hides it from the client."""
    log.error("request failed", exc_info=error)
    hidden = RequestError(f"internal error ({type(error).__name__}); see the server's log")
    hidden.status, hidden.type, hidden.code = 500, "server_error", "internal_error"
    return hidden


def as_request_error(error: BaseException) -> RequestError:
    """Return the error to send to the client: for a group of request errors, the first of them."""
    error = root_cause(error)
    if isinstance(error, BaseExceptionGroup):
        others = error.subgroup(lambda leaf: not isinstance(leaf, RequestError | BaseExceptionGroup))
        if others is None:  # of several request errors, any will do
            return as_request_error(error.exceptions[0])
    if isinstance(error, ActorLost | AskTimeout):
        return EngineNotReady("restarting a part of itself")
    return error if isinstance(error, RequestError) else internal_error(error)


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "body_too_large"}


def install(app: QuartTrio, max_body: Callable[[], int]) -> None:
    """Answer every error of ``app`` with OpenAI's body.

    Args:
        max_body: returns the bytes that a body may have, for the message about a larger one.
    """

    async def on_request_error(error: RequestError) -> Response:
        return error_response(error)

    async def on_http_error(error: HTTPException) -> Response:
        return _http_error(error, max_body())

    async def on_bug(error: Exception) -> Response:
        return error_response(as_request_error(error))

    app.register_error_handler(RequestError, on_request_error)
    app.register_error_handler(HTTPException, on_http_error)
    app.register_error_handler(Exception, on_bug)


def _no_such_route() -> str:
    """Return a line that names the current request's path, and the route that it is nearest to."""
    path = request.path if len(request.path) <= MAX_PATH else request.path[:MAX_PATH] + "…"
    rules = sorted({rule.rule for rule in current_app.url_map.iter_rules()})
    plain = {re.sub(r"<path:(\w+)>", r"{\1}", rule): rule for rule in rules}
    close = difflib.get_close_matches(path, plain, 1)
    return f"there is no route {path!r}; " + (f"did you mean {close[0]}?" if close else "GET /docs lists all")


def _http_error(error: HTTPException, max_body: int) -> Response:
    status = error.code or 500
    messages = {
        404: _no_such_route() if status == 404 else "",
        405: "method not allowed",
        408: "the body did not arrive in time",
        413: f"the body is larger than {max_body} bytes; see --max-body",
    }
    answer = RequestError(messages.get(status, error.description or error.name))
    answer.status, answer.code = status, _HTTP_CODES.get(status)
    allowed = error.valid_methods if isinstance(error, MethodNotAllowed) else None
    return error_response(answer, {"Allow": ", ".join(sorted(allowed))} if allowed else None)
