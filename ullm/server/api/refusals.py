"""Refuse the fields of a request that would change the answer, and are not acted on."""

from __future__ import annotations

from typing import Any

import msgspec

from ullm.errors import InvalidParameter
from ullm.server.api.fields import REFUSED, FieldRule


class Refusals:
    """The fields that the table of fields refuses for one schema.

    Args:
        schema: of the request's body; it need not have these fields.

    Attributes:
        decoder: reads them from a body, and skips all others.
    """

    def __init__(self, schema: type[msgspec.Struct]) -> None:
        self._rules = REFUSED.get(schema, ())
        names = {rule.name for rule in self._rules}
        names |= {rule.unless[0] for rule in self._rules if rule.unless is not None}
        fields = [(name, Any, None) for name in sorted(names)]
        self.decoder = msgspec.json.Decoder(msgspec.defstruct(f"Refused{schema.__name__}Fields", fields))

    def __bool__(self) -> bool:
        return bool(self._rules)

    def check(self, body: msgspec.Struct) -> None:
        """Return if a body asks for nothing that is refused.

        Args:
            body: from the `decoder`.

        Raises:
            InvalidParameter: it does; names the field.
        """
        fields = msgspec.structs.asdict(body)
        for rule in self._rules:
            if not _is_neutral(rule, fields[rule.name]) and not _is_excepted(rule, fields):
                raise InvalidParameter(rule.refusal, rule.name)


def _is_neutral(rule: FieldRule, value: Any) -> bool:
    """Return True for null, for what is empty, and for the values that the rule accepts."""
    return value in (None, "", [], {}) or any(_matches(value, each) for each in rule.accepted)


def _matches(value: Any, accepted: Any) -> bool:
    if isinstance(value, dict) and isinstance(accepted, dict):
        return accepted.items() <= value.items()
    return type(value) is type(accepted) and bool(value == accepted)


def _is_excepted(rule: FieldRule, fields: dict[str, Any]) -> bool:
    return rule.unless is not None and fields[rule.unless[0]] == rule.unless[1]
