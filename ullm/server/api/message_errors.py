"""Errors in the form of Anthropic's API, for its routes."""

from __future__ import annotations

import msgspec

from ullm.errors import RequestError
from ullm.server.api.message_objects import MessageError, MessageErrorDetail

PATH = "/v1/messages"

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
"""Status → type; others are the request's fault below 500, else the server's."""


def is_messages(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == PATH or path.startswith(f"{PATH}/")


def message_status(status: int) -> int:
    """Return the status by Anthropic's rules: a server that takes no requests now is overloaded, 529."""
    return 529 if status == 503 else status


def error_of(error: RequestError, request_id: str | None) -> MessageError:
    """Return the body for an error."""
    status = message_status(error.status)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return MessageError(error=MessageErrorDetail(type=kind, message=error.message), request_id=request_id)


def message_error_body(error: RequestError, request_id: str | None = None) -> bytes:
    """Return the body for an error, as JSON."""
    return msgspec.json.encode(error_of(error, request_id))
