"""Fields of a request that are not acted on: those that would change the answer are refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from ullm.errors import InvalidParameter
from ullm.logs import get_logger
from ullm.server.api.elsewhere import ELSEWHERE
from ullm.server.api.fields import FIELDS, REFUSED, FieldRule
from ullm.server.api.json_body import decode_any
from ullm.server.api.nested_fields import Unknown, shape_of, unknown_within

MAX_NAMES = 100
"""Names of unknown fields that are logged, once each, in the life of a server; clients choose them."""
MAX_IGNORED = 20
"""Names of unknown fields that one answer's header has."""
MAX_MET = 1000
"""Unknown fields of one request that are looked at; a conversation may have the same one in each turn."""
MAX_NAME = 64
"""Characters of an unknown field's name that are shown."""

log = get_logger(__name__)

_outline = msgspec.json.Decoder(dict[str, msgspec.Raw])


class UnknownFields:
    """What happens to fields that nobody knows: they are ignored, and that is said, or refused.

    Args:
        strict: refuse them.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._said: set[str] = set()

    def meet(self, fields: Sequence[Unknown]) -> list[str]:
        """Return the names to show to the client; log those that are new.

        Args:
            fields: of one request, as `FieldCheck` returns them.

        Raises:
            InvalidParameter: they are refused; names the first of them.
        """
        for field in fields:
            if self._strict:
                raise InvalidParameter(
                    f"{field.place!r} is not a field of this request; {_advice(field)}", field.place
                )
            if field.name not in self._said and len(self._said) < MAX_NAMES:
                self._said.add(field.name)
                log.warning(
                    "a field of a request is ignored, because nobody knows it",
                    field=field.name,
                    advice=_advice(field),
                )
        return [field.name for field in fields]


def _advice(field: Unknown) -> str:
    close = difflib.get_close_matches(field.name.rpartition(".")[2], field.known, 1)
    return f"did you mean {close[0]}?" if close else "correct it or leave it out"


class FieldCheck:
    """Checks the fields of bodies that the schema does not have.

    Args:
        schema: of the request's body.
    """

    def __init__(self, schema: type[msgspec.Struct]) -> None:
        self._rules = REFUSED.get(schema, ()) + ELSEWHERE.get(schema, ())
        names = {*schema.__struct_fields__, *(rule.name for rule in FIELDS.get(schema, ()))}
        self._known = frozenset(names | {rule.name for rule in self._rules})
        self._shape = shape_of(schema)

    def __call__(self, body: bytes) -> list[Unknown]:
        """Return the fields that nobody knows: the first few, each name once, cut to a bearable length.

        Args:
            body: a JSON object.

        Raises:
            InvalidParameter: the body asks for what is refused; names the field.
        """
        fields = _outline.decode(body)
        for rule in self._rules:
            if rule.name not in fields:
                continue
            value = _value(fields, rule.name)
            if not _is_neutral(rule, value) and not _is_excepted(rule, fields):
                raise InvalidParameter(rule.refusal, rule.name)
        met: dict[str, Unknown] = {}
        for field in islice(self._unknown_fields(fields), MAX_MET):
            name = field.name[:MAX_NAME]
            if name not in met and len(met) == MAX_IGNORED:
                break
            met.setdefault(name, Unknown(field.place[:MAX_NAME], name, field.known))
        return list(met.values())

    def _unknown_fields(self, fields: Mapping[str, msgspec.Raw]) -> Iterator[Unknown]:
        for name in fields:
            if name not in self._known:
                yield Unknown(name, name, self._known)
        yield from unknown_within(fields, self._shape)


def _value(fields: dict[str, msgspec.Raw], name: str) -> Any:
    return decode_any(bytes(fields[name])) if name in fields else None


def _is_neutral(rule: FieldRule, value: Any) -> bool:
    """Return True for null, for what is empty and so asks for nothing, and for what the rule accepts."""
    if value is None or (value in ("", [], {}) and not rule.empty_asks):
        return True
    return any(_matches(value, each) for each in rule.accepted)


def _matches(value: Any, accepted: Any) -> bool:
    if isinstance(value, dict) and isinstance(accepted, dict):
        return accepted.items() <= value.items()
    return type(value) is type(accepted) and bool(value == accepted)


def _is_excepted(rule: FieldRule, fields: dict[str, msgspec.Raw]) -> bool:
    return rule.unless is not None and _value(fields, rule.unless[0]) == rule.unless[1]
