"""Errors as OpenAI's body, with their status and headers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import msgspec
from quart import Response
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
from ullm.server.api.responses import ErrorBody, ErrorDetail
from ullm.supervision import root_cause

log = get_logger(__name__)

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
    """A web page has sent its visitor's browser to the admin listener.

    Raised by: the listener of ``--admin-listen``, for requests with an origin or a foreign host name.
    Remedy: use a client that is no browser, and address the listener as localhost or by its address.
    """

    status = 403
    code = "foreign_origin"


class UnsupportedMediaType(RequestError):
    """The content type of the body is not JSON.

    Raised by: the server.
    Remedy: send ``Content-Type: application/json``.
    """

    status = 415
    code = "unsupported_media_type"


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
    """Return the response for an error."""
    return Response(
        error_body(error),
        status=error.status,
        headers={**error_headers(error), **(headers or {})},
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


def install(app: QuartTrio, max_body: int) -> None:
    """Answer every error of ``app`` with OpenAI's body.

    Args:
        max_body: bytes, for the message about a larger body.
    """

    async def on_request_error(error: RequestError) -> Response:
        return error_response(error)

    async def on_http_error(error: HTTPException) -> Response:
        return _http_error(error, max_body)

    async def on_bug(error: Exception) -> Response:
        return error_response(as_request_error(error))

    app.register_error_handler(RequestError, on_request_error)
    app.register_error_handler(HTTPException, on_http_error)
    app.register_error_handler(Exception, on_bug)


def _http_error(error: HTTPException, max_body: int) -> Response:
    status = error.code or 500
    messages = {
        404: "no such route",
        405: "method not allowed",
        408: "the body did not arrive in time",
        413: f"the body is larger than {max_body} bytes; see --max-body",
    }
    answer = RequestError(messages.get(status, error.description or error.name))
    answer.status, answer.code = status, _HTTP_CODES.get(status)
    allowed = error.valid_methods if isinstance(error, MethodNotAllowed) else None
    return error_response(answer, {"Allow": ", ".join(sorted(allowed))} if allowed else None)
