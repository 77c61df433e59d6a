"""Lines of OpenAI's batch files: what one asks, and what is answered; see `ullm.cli.run_batch`."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ullm.errors import ResourceUnavailable

URLS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"),
    *("/v1/messages", "/v1/score", "/v1/rerank"),
)
"""What a line may ask for: the first four are OpenAI's."""


class BatchLine(msgspec.Struct, kw_only=True):
    """A line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


class LineFault(Exception):
    """A line cannot be run.

    Args:
        custom_id: of the line, as far as it can be read.
    """

    def __init__(self, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


def parse(line: bytes, number: int) -> BatchLine:
    """Return a line of the input.

    Args:
        number: of the line, from 1.

    Raises:
        LineFault: it cannot be run; names the cause.
    """
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LineFault(f"line {number} is not JSON: {error}") from None
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    known = custom_id if isinstance(custom_id, str) else None
    try:
        asked = msgspec.convert(value, BatchLine)
    except msgspec.ValidationError as error:
        raise LineFault(f"line {number}: {error}", known) from None
    if asked.method != "POST" or asked.url not in URLS:
        raise LineFault(
            f"line {number}: {asked.method} {asked.url} cannot be run; there are POST {', '.join(URLS)}",
            known,
        )
    for name in ("stream", "background"):
        if asked.body.get(name):
            raise LineFault(f"line {number}: {name} has no place in a batch", known)
    return asked


def answered(asked: BatchLine, status: int, request_id: str, body: bytes) -> bytes:
    """Return the line of the output for an answer, whatever its status."""
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    return _line(asked.custom_id, response, None)


def failed(fault: LineFault) -> bytes:
    """Return the line of the output for a line that cannot be run."""
    return _line(fault.custom_id, None, {"code": "invalid_line", "message": str(fault)})


def _line(custom_id: str | None, response: Any, error: Any) -> bytes:
    id = f"batch_req_{secrets.token_hex(12)}"
    return (
        msgspec.json.encode({"id": id, "custom_id": custom_id, "response": response, "error": error}) + b"\n"
    )


@dataclass(frozen=True)
class Earlier:
    """What an earlier run has written.

    Args:
        done: names of the requests with an answer.
        size: bytes of whole lines; what follows is a line that was cut.
    """

    done: frozenset[str] = frozenset()
    size: int = 0


def read_output(path: Path) -> Earlier:
    """Return what an earlier run has written; requests that failed are to be run again.

    Raises:
        ResourceUnavailable: the file is not the output of a batch.
    """
    done, size = set(), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                value = msgspec.json.decode(line)
                if (value["response"] or {}).get("status_code") == 200:
                    done.add(value["custom_id"])
            except (msgspec.DecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
                raise ResourceUnavailable(
                    f"{path}: line {number} is not of a batch's output; name another -o"
                ) from None
            size += len(line)
    return Earlier(frozenset(done), size)
