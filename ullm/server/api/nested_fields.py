"""Fields within the objects of a request that nobody knows: of messages, of tools, of options."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec

from ullm.server.api import message_requests, response_requests, schemas

Shape = dict[str, "Shape | None"]
"""Name of a known field → the fields of the objects within; None: they are not looked at."""


class Unknown(NamedTuple):
    """A field that nobody knows.

    Args:
        place: with the numbers of list entries, as in ``messages[0].contnt``.
        name: without them.
        known: the fields that its object could have.
    """

    place: str
    name: str
    known: frozenset[str]


_MEDIA = (
    *("image_url", "input_audio", "audio_url", "video_url", "file", "detail", "uuid"),
    *("file_id", "file_url", "file_data", "filename"),
)

WITHOUT_EFFECT: Mapping[type[msgspec.Struct], tuple[str, ...]] = {
    schemas.StreamOptions: ("include_obfuscation",),
    schemas.ContentPart: ("cache_control", "annotations", "logprobs", *_MEDIA),
    schemas.Message: ("annotations", "cache_control", "index", "weight"),
    schemas.ToolCall: ("index", "cache_control"),
    schemas.Tool: ("cache_control",),
    message_requests.ContentBlock: ("caller", "toolset_name", "source", "title", "context"),
    message_requests.MessageTool: ("allowed_callers", "defer_loading", "eager_input_streaming"),
}
"""Fields that change nothing in the answer's text, and that clients send in earlier turns and with tools; and
those of images and the like, which are refused by their type."""

_PART: Shape = dict.fromkeys(("type", "text", "refusal", "annotations", "logprobs", "cache_control", *_MEDIA))
_ITEM = (
    *(
        "type",
        "role",
        "id",
        "status",
        "phase",
        "call_id",
        "name",
        "arguments",
        "summary",
        "encrypted_content",
    ),
    *("created_by", "namespace"),
)
_DICTIONARIES: Mapping[tuple[type[msgspec.Struct], str], Shape] = {
    (response_requests.ResponsesRequest, "input"): {
        **dict.fromkeys(_ITEM),
        "content": _PART,
        "output": _PART,
    },
    (response_requests.ResponsesRequest, "tools"): dict.fromkeys(
        ("type", "name", "description", "parameters", "strict", "defer_loading")
    ),
}
"""Fields whose objects have no schema → what they may have."""

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw])


def shape_of(schema: type[msgspec.Struct], seen: dict[Any, Shape] | None = None) -> Shape:
    """Return the fields of a schema, and of the objects within."""
    seen = {} if seen is None else seen
    if schema in seen:
        return seen[schema]
    shape = seen[schema] = {}
    hints = typing.get_type_hints(schema, include_extras=True)
    for name in schema.__struct_fields__:
        inner = _struct_in(hints[name])
        shape[name] = _DICTIONARIES.get((schema, name)) if inner is None else shape_of(inner, seen)
    shape.update(dict.fromkeys(WITHOUT_EFFECT.get(schema, ())))
    return shape


def _struct_in(hint: Any) -> type[msgspec.Struct] | None:
    """Return the schema of the objects that a field has, be it in a list or beside other types."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        arguments = arguments[:1]
    elif origin not in (list, typing.Union, types.UnionType):
        return hint if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None
    return next((found for each in arguments if (found := _struct_in(each)) is not None), None)


def unknown_within(fields: Mapping[str, msgspec.Raw], shape: Shape) -> Iterator[Unknown]:
    """Yield the fields within the values of a body that nobody knows.

    Args:
        fields: of the body, which has been read by its schema.
        shape: of that schema.
    """
    for name, value in fields.items():
        inner = shape.get(name)
        if inner is not None:
            yield from _unknown(value, inner, name, name)


def _unknown(value: msgspec.Raw, shape: Shape, place: str, name: str) -> Iterator[Unknown]:
    begin = bytes(memoryview(value)[:1])
    if begin == b"[":
        for index, each in enumerate(_list.decode(value)):
            yield from _unknown(each, shape, f"{place}[{index}]", name)
    elif begin == b"{":
        for key, inner in _object.decode(value).items():
            if key not in shape:
                yield Unknown(f"{place}.{key}", f"{name}.{key}", frozenset(shape))
            elif (within := shape[key]) is not None:
                yield from _unknown(inner, within, f"{place}.{key}", f"{name}.{key}")
