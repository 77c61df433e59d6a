"""JSON bodies as clients write them: compressed, with a byte order mark, with whole numbers like ``5.0``."""

from __future__ import annotations

import codecs
import re
import zlib
from typing import Any, Generic, TypeVar

import msgspec
import trio
from quart import request
from werkzeug.exceptions import RequestEntityTooLarge

from ullm.server.api.errors import InvalidJSON, UnsupportedMediaType, invalid_field

R = TypeVar("R", bound=msgspec.Struct)

_skipping = msgspec.json.Decoder(msgspec.Raw)

MAX_BIASES = 4096
"""Entries of a ``logit_bias`` among which the wrong one is looked for."""

_GZIP = 16 + zlib.MAX_WBITS
"""For zlib: a header and a checksum as gzip writes them (RFC 1952)."""
_FLOAT_FOR_INT = re.compile(r"Expected `(?:.*\bint\b.*)`, got `float`.* - at `\$\.(?P<field>\w+)")


async def read_body(*, optional: bool) -> bytes:
    """Return the current request's body, decompressed.

    Args:
        optional: it may be empty, of whatever type.

    Raises:
        UnsupportedMediaType: it is not JSON, or compressed otherwise than by gzip.
        RequestEntityTooLarge: it is beyond the limit, compressed or not.
    """
    body: bytes = await request.get_data(as_text=False)  # type: ignore[assignment]
    if optional and not body:
        return body
    mimetype = request.mimetype
    is_json = mimetype == "application/json" or mimetype.endswith("+json")
    if not is_json and (mimetype or body):  # web pages need no leave to send other types, or none
        found = f", not {mimetype}" if mimetype else "; send 'Content-Type: application/json'"
        raise UnsupportedMediaType(f"the content type must be application/json{found}")
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("gzip", "x-gzip"):
        body = await trio.to_thread.run_sync(_decompress, body, request.max_content_length)
    elif encoding not in ("identity", ""):
        raise UnsupportedMediaType(f"the content encoding must be gzip or none, not {encoding}")
    return body.removeprefix(codecs.BOM_UTF8)


def _decompress(body: bytes, limit: int | None) -> bytes:
    """Return the content of gzip's members, whose size is bounded whatever they claim."""
    pieces, size = [], 0
    while body:
        member = zlib.decompressobj(_GZIP)
        try:
            pieces.append(member.decompress(body, 0 if limit is None else limit + 1 - size))
        except zlib.error as error:
            raise InvalidJSON(f"the body is not valid gzip: {error}") from None
        size += len(pieces[-1])
        if limit is not None and size > limit:
            raise RequestEntityTooLarge
        if not member.eof:
            raise InvalidJSON("the body is not valid gzip: it breaks off")
        body = member.unused_data
    return b"".join(pieces)


class BodyDecoder(Generic[R]):
    """Decodes bodies of one schema."""

    def __init__(self, schema: type[R]) -> None:
        self._schema = schema
        self._decoder = msgspec.json.Decoder(schema)

    def decode(self, body: bytes) -> R:
        """Return the body as its schema.

        A whole number may be written as a float: JSON does not tell them apart (RFC 8259, 6), and languages
        with one kind of numbers write either.

        Raises:
            InvalidParameter: a value is of the wrong type; names the field.
            InvalidJSON: it is not JSON.
        """
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            return self._with_whole_numbers(body, error)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidJSON(f"the body is not valid JSON: {error}") from None
        except RecursionError:
            raise InvalidJSON("the body's JSON is nested too deeply") from None

    def _with_whole_numbers(self, body: bytes, error: msgspec.ValidationError) -> R:
        """Decode again, with whole numbers as such in the fields that want them."""
        done: set[str] = set()
        values: Any = None
        while (place := _FLOAT_FOR_INT.search(str(error))) and place["field"] not in done:
            field = place["field"]
            done.add(field)
            values = decode_any(body) if values is None else values
            values[field] = _whole(values[field])
            try:
                return msgspec.convert(values, self._schema, str_keys=True)
            except msgspec.ValidationError as another:
                error = another
        raise named(error, body)


def named(error: msgspec.ValidationError, body: bytes) -> Exception:
    """Return the error for a value of the wrong type, which also names a wrong key of ``logit_bias``."""
    wrong = invalid_field(error)
    if wrong.param == "logit_bias":
        key = next((key for key, bias in _biases(body) if not _is_bias(key, bias)), None)
        if key is not None:
            return type(wrong)(f"logit_bias[{key!r}]: {wrong.message.partition(': ')[2]}", wrong.param)
    return wrong


def _biases(body: bytes) -> list[tuple[str, Any]]:
    biases = decode_any(body).get("logit_bias")
    return list(biases.items()) if isinstance(biases, dict) and len(biases) <= MAX_BIASES else []


def _is_bias(key: str, bias: Any) -> bool:
    return re.fullmatch(r"-?\d{1,18}", key) is not None and type(bias) in (int, float)


def _whole(value: Any, depth: int = 2) -> Any:
    """Return whole numbers as such, also within a list, or a list of lists, as prompts are."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and depth:
        return [_whole(each, depth - 1) for each in value]
    return value


def skip_over(body: bytes) -> None:
    """Return if a body is JSON, of which nothing is made.

    Raises:
        InvalidJSON: it is not.
    """
    try:
        _skipping.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJSON(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidJSON("the body's JSON is nested too deeply") from None


def decode_any(body: bytes) -> Any:
    """Return JSON as Python's values.

    Raises:
        InvalidJSON: it is not JSON.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJSON(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidJSON("the body's JSON is nested too deeply") from None
