"""The description of one route, from which the app, the access rules and the documents derive."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from quart import Response

from ullm.config import ServerConfig
from ullm.server.api.message_errors import is_messages, message_status
from ullm.server.api.message_objects import MessageError
from ullm.server.api.responses import ErrorBody

Handler = Callable[..., Awaitable[Response]]
"""Called with the app's service, the decoded request if the route has a schema, and the path's parameters."""


class Access(enum.Enum):
    """The clients that may call a route."""

    OPEN = "open"
    """Everybody, without a key."""
    KEY = "API key"
    """Clients with the API key, or everybody if there is none."""
    ADMIN = "admin"
    """Clients with the admin key; everybody who reaches the admin listener."""


class Needs(enum.Enum):
    """The state of the engine that a route requires before it reads the body of a request."""

    NOTHING = enum.auto()
    MODEL = enum.auto()
    """A loaded model."""
    ADMISSION = enum.auto()
    """A loaded model, and room for one more request."""


_UNMET = {Needs.NOTHING: (), Needs.MODEL: (503,), Needs.ADMISSION: (429, 500, 503)}
"""Statuses of the errors where the engine is in another state."""


@dataclass(frozen=True)
class Route:
    """One operation of the API.

    Args:
        path: as in OpenAPI, with ``{parameters}``; each takes the rest of the path.
        request: schema of the JSON body.
        optional: the body may be left out, which means an empty object.
        in_query: the request's fields may also come in the query; those in the body win.
        answer: schema of the answer with status 200; None is any object.
        event: schema of the events that a streamed answer has.
        media_type: of the answer.
        verdict: status 503 has the same schema as status 200, and means no.
        errors: statuses beside those that follow from the other facts.
        kept: whether a request, decoded if there is a schema, is for whoever keeps the stored answers; None:
            no request is.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    access: Access = Access.KEY
    needs: Needs = Needs.NOTHING
    request: type[msgspec.Struct] | None = None
    optional: bool = False
    in_query: bool = False
    answer: Any = None
    event: type[msgspec.Struct] | None = None
    media_type: str = "application/json"
    verdict: bool = False
    errors: tuple[int, ...] = ()
    kept: Callable[[ServerConfig, Any], bool] | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the request's fields."""
        return () if self.request is None else self.request.__struct_fields__

    def error_statuses(self, *, secured: bool) -> tuple[int, ...]:
        """Return the statuses of the errors that the route can answer with.

        Args:
            secured: the server has an API key.
        """
        statuses = {*self.errors, *_UNMET[self.needs]}
        if self.request is not None:
            statuses |= {400, 408, 413, 415}
        if self.access is Access.ADMIN:
            statuses |= {400, 401, 403}
        if self.access is Access.KEY:
            statuses.add(401 if secured else 403)
        if is_messages(self.path):
            statuses = {message_status(status) for status in statuses}
        return tuple(sorted(statuses))

    @property
    def error(self) -> type[msgspec.Struct]:
        """Schema of an error's body."""
        return MessageError if is_messages(self.path) else ErrorBody
