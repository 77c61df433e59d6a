"""Where a client takes up a stream: what its request says about the last event that it has."""

from __future__ import annotations

from quart import request

from ullm.errors import InvalidParameter


def wants_stream() -> bool:
    """Return whether the current request asks, by its query, for events.

    Raises:
        InvalidParameter: it is neither true nor false, or not true with ``starting_after``.
    """
    text = request.args.get("stream", "").lower()
    if text not in ("", "true", "1", "false", "0"):
        raise InvalidParameter(f"stream must be true or false, got {text!r}", "stream")
    if text not in ("true", "1") and "starting_after" in request.args:
        raise InvalidParameter("starting_after needs stream=true", "starting_after")
    return text in ("true", "1")


def event_number(id: str = "") -> int:
    """Return the number of the last event that the client has; -1: it has none.

    It is in the query, as ``starting_after``, or in the header ``Last-Event-ID``.

    Args:
        id: name of the answer, which the id of an event may have before its number, as in ``ID:17``.

    Raises:
        InvalidParameter: it is no number.
    """
    text = request.args.get("starting_after", request.headers.get("Last-Event-ID", "-1"))
    try:
        return int(text.removeprefix(f"{id}:"))
    except ValueError:
        raise InvalidParameter(
            f"starting_after must be the number of an event, got {text!r}", "starting_after"
        ) from None


def resumed_stream() -> str | None:
    """Return the name of the answer that the current request goes on with, by its ``Last-Event-ID``."""
    name, colon, _ = request.headers.get("Last-Event-ID", "").rpartition(":")
    return name if colon else None
