"""What options are given: each value checked against its field's type, and errors that name the flag."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ullm.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
"""Field → its type; finding out takes a millisecond."""


def convert_fields(config: DataclassInstance) -> None:
    """Give each field a value of its own type; numpy's numbers and paths are converted.

    Raises:
        ConfigError: a value of the wrong type; names the option.
    """
    secrets = {spec.name: spec.metadata["secret"] for spec in dataclasses.fields(config)}
    for name, hint in _hints(type(config)).items():
        value = _plain(getattr(config, name))
        try:
            object.__setattr__(config, name, msgspec.convert(value, hint))
        except msgspec.ValidationError:
            shown = f"a {type(value).__name__}" if secrets[name] else repr(value)
            raise ConfigError(f"{flag(name)} must be {_kind(hint)}, got {shown}") from None


def _plain(value: Any) -> Any:
    """Return a value of another library's type as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple | range):
        return tuple(map(_plain, value))
    for convert in (operator.index, float):
        try:
            return convert(value)
        except (TypeError, ValueError):
            continue
    return value


def _kind(hint: Any) -> str:
    """Return the values that a field takes, in words."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_kind, arguments))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_kind(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    return names.get(hint, "None")


def flag(name: str) -> str:
    """Return how the command line spells an option."""
    return "--" + name.replace("_", "-")


def at_least(config: DataclassInstance, name: str, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        ConfigError: it is; names the option.
    """
    if not getattr(config, name) >= least:
        raise ConfigError(f"{flag(name)} must be at least {least}, got {getattr(config, name)}")
