"""Command line flags out of dataclass fields: names, types, defaults and help are written once.

A command's function takes ``**given``, the options that the user wrote; its signature, which the
command line library reads, is made here. What is not given comes from ``ULLM_*`` variables and then
from the field's default.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from cyclopts import Group, Parameter

from ullm.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    ServerConfig,
    SleepConfig,
    SupervisionConfig,
    from_env,
)
from ullm.errors import ConfigError
from ullm.sampling import SamplingParams

CONCERNS: Mapping[str, type[Any]] = {
    "Model": ModelConfig,
    "KV cache": CacheConfig,
    "Scheduler": SchedulerConfig,
    "Parallelism": ParallelConfig,
    "Supervision": SupervisionConfig,
    "Sleep": SleepConfig,
    "Server": ServerConfig,
}
"""Heading → dataclass; `EngineConfig` is all but the last, plus logging."""

GROUPS = ("Sampling", *CONCERNS, "Logging")
"""Order of the headings in help texts."""
SAMPLING_FIELDS = (
    "max_tokens temperature top_p top_k min_p seed stop stop_token_ids ignore_eos min_tokens "
    "include_stop_str_in_output repetition_penalty presence_penalty frequency_penalty "
    "skip_special_tokens timeout"
).split()
ALIASES = {"max_tokens": "--max-new-tokens"}

Command = Callable[..., int]
C = TypeVar("C", EngineConfig, ServerConfig)


@dataclasses.dataclass(frozen=True)
class Option:
    """One flag: the field it sets, and how the command line shows it."""

    name: str
    annotation: Any
    default: Any
    help: str
    group: str

    @property
    def flag(self) -> str:
        """As in ``--block-size``."""
        return "--" + self.name.replace("_", "-")

    def parameter(self) -> inspect.Parameter:
        """What the command line library reads."""
        names = [self.flag, *([ALIASES[self.name]] if self.name in ALIASES else [])]
        shown = self.default not in (None, (), False)
        group = Group(self.group, sort_key=GROUPS.index(self.group))
        detail = Parameter(name=names, help=self.help, group=group, show_default=shown)
        annotation = Annotated[_typed_in(self.annotation), detail]  # type: ignore[valid-type]
        # A default of another type than what is typed in would fail where the library validates it,
        # as it does once pydantic is loaded. It is never passed on: only what was given is.
        default = None if self.default == () else self.default
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )


def engine_options() -> list[Option]:
    """Every field of `EngineConfig`, grouped by concern."""
    grouped = [
        option
        for title, cls in CONCERNS.items()
        if cls is not ServerConfig
        for option in fields_of(cls, title)
    ]
    known = {option.name for option in grouped}
    return grouped + [option for option in fields_of(EngineConfig, "Logging") if option.name not in known]


def server_options() -> list[Option]:
    """Every field of `ServerConfig`."""
    return fields_of(ServerConfig, "Server")


def sampling_options(defaults: Mapping[str, Any]) -> list[Option]:
    """The fields of `SamplingParams` that make sense for one text on a terminal.

    Args:
        defaults: what this command uses where the user says nothing.
    """
    hints, helps = typing.get_type_hints(SamplingParams), docstring_arguments(SamplingParams)
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    return [
        Option(name, hints[name], defaults.get(name, fields[name].default), helps[name], "Sampling")
        for name in SAMPLING_FIELDS
    ]


def fields_of(cls: type[Any], group: str) -> list[Option]:
    """A dataclass's fields as options, with the help of their metadata."""
    hints = typing.get_type_hints(cls)
    return [
        Option(field.name, hints[field.name], field.default, field.metadata["help"], group)
        for field in dataclasses.fields(cls)
    ]


def docstring_arguments(cls: type[Any]) -> dict[str, str]:
    """Name → text of the ``Args:`` section of a docstring."""
    section = inspect.getdoc(cls).partition("Args:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: _sentence(" ".join(text.split())) for name, text in entries}


def with_options(*options: Iterable[Option]) -> Callable[[Callable[..., int]], Command]:
    """Decorate ``def command(positional…, *, own=…, **given)``: ``**given`` becomes these options."""

    def decorate(function: Callable[..., int]) -> Command:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        derived = [option.parameter() for group in options for option in group]

        def command(*args: Any, **given: Any) -> int:
            return function(*args, **given)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature([*own, *derived])  # type: ignore[attr-defined]
        return command

    return decorate


def build(cls: type[C], given: Mapping[str, Any]) -> C:
    """``cls`` from the options that belong to it, ``ULLM_*`` variables, and defaults.

    Raises:
        ConfigError: a value that cannot be used; names the flag or variable.
    """
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    own = {name: _converted(name, value, hints[name]) for name, value in given.items() if name in names}
    return from_env(cls, **own)


def sampling_params(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from the options that belong to them.

    Raises:
        InvalidParameter: a value out of range.
        ConfigError: a list that is not one.
    """
    hints = typing.get_type_hints(SamplingParams)
    own = {k: _converted(k, v, hints[k]) for k, v in given.items() if k in SAMPLING_FIELDS}
    return SamplingParams(**{**defaults, **own})


def _typed_in(annotation: Any) -> Any:
    # A tuple is written as one argument with commas, as in ULLM_* variables; strings may repeat.
    if _is_stop(annotation):
        return list[str] | None
    return str | None if "tuple[" in str(annotation) else annotation


def _is_stop(annotation: Any) -> bool:
    # "A string or several": the only kind of field that takes one value or a tuple of them.
    return (
        typing.get_origin(annotation) is not tuple
        and str in typing.get_args(annotation)
        and "tuple[" in str(annotation)
    )


def _converted(name: str, value: Any, annotation: Any) -> Any:
    if _is_stop(annotation):
        return tuple(value or ())
    if "tuple[" not in str(annotation) or not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return msgspec.convert(parts, annotation, strict=False)
    except msgspec.ValidationError as error:
        reason = str(error).split(" - at")[0]
        raise ConfigError(
            f"--{name.replace('_', '-')} {value}: {reason}; separate values by commas"
        ) from None


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def type_name(annotation: Any) -> str:
    """How docs write a type: ``int``, ``a | b`` for choices, ``list of int``."""
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(annotation) is tuple:
        return f"list of {arguments[0].__name__}"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
    return str(annotation.__name__)
