"""From the bytes of a body to a checked request: the same whether here or in a process of its own."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from ullm.config import ServerConfig
from ullm.errors import InvalidParameter
from ullm.server.api import limits
from ullm.server.api.json_body import BodyDecoder, skip_over
from ullm.server.api.nested_fields import Unknown
from ullm.server.api.refusals import FieldCheck

R = TypeVar("R", bound=msgspec.Struct)


class BodyParser(Generic[R]):
    """Parses bodies of one schema.

    Args:
        config: limits of what a body has.
    """

    def __init__(self, schema: type[R], config: ServerConfig) -> None:
        self._config = config
        self._decoder = BodyDecoder(schema)
        self._check = FieldCheck(schema)

    def parse(self, body: bytes) -> tuple[R, list[Unknown]]:
        """Return the request, and the fields of it that nobody knows.

        Raises:
            InvalidParameter: a value is of the wrong type, or the body has too much, or asks for what is
                refused; names the field.
            InvalidJSON: it is not JSON.
        """
        try:
            limits.check_containers(body, self._config)
            if len(body) > limits.MOST_BODY:
                limits.check_values(body)
        except InvalidParameter:
            skip_over(body)  # what is no JSON is told so, without making anything of it
            raise
        return self._decoder.decode(body), self._check(body)
