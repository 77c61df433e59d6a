"""Command line flags derived from dataclass fields: names, types, defaults and help are written once.

A command's function takes ``**options``, the options that the user gave; its signature, which the command
line library reads, is made here. Options that are not given come from ``ULLM_*`` variables, and then from
the field's default. The library could flatten the dataclasses by itself, but it reads help texts from
annotations of its own, for which ``import ullm`` would have to load it, and it would fill in the defaults,
so that an option of the command line could no longer be told from one that was left out.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from cyclopts import Group, Parameter

from ullm.cli.options import split_commas, whole_number
from ullm.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    ServerConfig,
    SleepConfig,
    SupervisionConfig,
)
from ullm.errors import ConfigError, InvalidParameter
from ullm.hosting.config_sources import CONFIG_VARIABLE, SAMPLING_FIELDS, ConfigFile, from_env
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
"""Heading → dataclass; `EngineConfig` consists of all but the last, plus logging."""

GROUPS = ("Configuration file", "Sampling", *CONCERNS, "Logging")
"""Headings of help texts, in their order."""
SAMPLING_ALIASES: Mapping[str, tuple[str, ...]] = {"max_tokens": ("--max-new-tokens",)}
UNSPLIT = frozenset({"stop", "api_key"})
"""Fields that list, of whose values a comma may be part: half a key would be a key that nobody chose."""

Command = Callable[..., int]
C = TypeVar("C", EngineConfig, ServerConfig)


@dataclasses.dataclass(frozen=True)
class Option:
    """One flag: the field it sets, and how the command line shows it.

    Args:
        aliases: further names of the flag.
        shown: False for a flag that help texts leave out, and that cannot be turned off.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    group: str
    aliases: tuple[str, ...] = ()
    shown: bool = True

    @property
    def flag(self) -> str:
        """The name on the command line, as in ``--block-size``."""
        return "--" + self.name.replace("_", "-")

    @property
    def lists(self) -> bool:
        """True if the option takes several values."""
        return "tuple[" in str(self.annotation)

    def parameter(self) -> inspect.Parameter:
        """Return the parameter that the command line library reads."""
        detail = Parameter(
            name=[self.flag, *self.aliases],
            help=self.help,
            group=Group(self.group, sort_key=GROUPS.index(self.group)),
            show=self.shown,
            show_default=self.default not in (None, (), False, ""),
            negative=None if self.shown and not self.lists else "",
            converter=whole_number if self.annotation in (int, int | None) else None,
        )
        annotation = Annotated[list[str] | None if self.lists else self.annotation, detail]  # type: ignore[valid-type]
        # A default of another type than what is typed in would fail where the library validates it,
        # as it does once pydantic is loaded. It is never passed on: only what was given is.
        default = None if self.lists else self.default
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )


CONFIG_OPTION = Option(
    "config",
    str | None,
    None,
    "File in TOML with options by their names, as in max-bs = 8; options on the command line and variables "
    "win over it.",
    "Configuration file",
)


def engine_options() -> list[Option]:
    """Return an option for each field of `EngineConfig`, grouped by concern."""
    grouped = [
        option
        for title, cls in CONCERNS.items()
        if cls is not ServerConfig
        for option in fields_of(cls, title)
    ]
    known = {option.name for option in grouped}
    return grouped + [option for option in fields_of(EngineConfig, "Logging") if option.name not in known]


def with_switches(line: Sequence[str]) -> list[str]:
    """Return a command line in which ``--prefix-cache false`` is ``--prefix-cache=false``.

    The library takes a switch's value only behind ``=``, and ``false`` for the model, or the prompt.
    """
    options = [*engine_options(), *server_options()]
    switches = {flag for each in options if each.annotation is bool for flag in (each.flag, *each.aliases)}
    arguments = list(line)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for index in reversed(range(1, end)):
        if arguments[index - 1] in switches and arguments[index].lower() in ("true", "false"):
            arguments[index - 1 : index + 1] = [f"{arguments[index - 1]}={arguments[index].lower()}"]
    return arguments


def server_options() -> list[Option]:
    """Return an option for each field of `ServerConfig`."""
    return fields_of(ServerConfig, "Server")


def sampling_options(defaults: Mapping[str, Any]) -> list[Option]:
    """Return options for the fields of `SamplingParams` that make sense for one text on a terminal.

    Args:
        defaults: this command's own defaults.
    """
    hints, helps = typing.get_type_hints(SamplingParams), docstring_arguments(SamplingParams)
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    return [
        Option(
            name,
            hints[name],
            defaults.get(name, fields[name].default),
            helps.get(name, ""),
            "Sampling",
            SAMPLING_ALIASES.get(name, ()),
        )
        for name in SAMPLING_FIELDS
    ]


def fields_of(cls: type[Any], group: str) -> list[Option]:
    """Return a dataclass's fields as options, with the help of their metadata."""
    hints = typing.get_type_hints(cls)
    return [
        Option(
            field.name,
            hints[field.name],
            field.default,
            field.metadata["help"],
            group,
            field.metadata["aliases"],
        )
        for field in dataclasses.fields(cls)
    ]


def docstring_arguments(cls: type[Any]) -> dict[str, str]:
    """Return the ``Args:`` section of a docstring: name → text; ``python -OO`` leaves none."""
    section = inspect.getdoc(cls).partition("Args:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: _sentence(" ".join(text.split())) for name, text in entries}


def with_options(*options: Iterable[Option]) -> Callable[[Callable[..., int]], Command]:
    """Decorate ``def command(positional…, *, own=…, **given)``: ``**options`` becomes these options.

    Each such command takes ``--config``, too, and gets the file itself as the option ``config``.
    """

    def decorate(function: Callable[..., int]) -> Command:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        derived = [option.parameter() for group in ([CONFIG_OPTION], *options) for option in group]

        def command(*args: Any, config: str | None = None, **options: Any) -> int:
            path = config or os.environ.get(CONFIG_VARIABLE)
            return function(*args, **options, **({"config": ConfigFile.read(path)} if path else {}))

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature([*own, *derived])  # type: ignore[attr-defined]
        return command

    return decorate


def build(cls: type[C], options: Mapping[str, Any]) -> C:
    """Build ``cls`` from the options that belong to it, ``ULLM_*`` variables, a file, and defaults.

    Raises:
        ConfigError: a value that cannot be used; names the flag, the variable or the file.
    """
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    own = {name: _converted(name, value, hints[name]) for name, value in options.items() if name in names}
    return from_env(cls, file=options.get("config"), **own)


def sampling_params(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """Build sampling parameters from the options that belong to them, a file, and a command's defaults.

    Raises:
        ConfigError: a value out of range, or a list that is not one.
    """
    hints = typing.get_type_hints(SamplingParams)
    own = {k: _converted(k, v, hints[k]) for k, v in options.items() if k in SAMPLING_FIELDS}
    file: ConfigFile | None = options.get("config")
    of_file = {} if file is None else file.values_of(SamplingParams, SAMPLING_FIELDS)
    try:
        return SamplingParams(**{**defaults, **of_file, **own})
    except InvalidParameter as error:
        in_file = error.param in of_file and error.param not in own
        raise ConfigError(f"--config {file.path}: {error}" if file and in_file else str(error)) from None


def _converted(name: str, value: Any, annotation: Any) -> Any:
    """Convert the values of an option that lists: it may be repeated, and a value may hold commas."""
    if "tuple[" not in str(annotation):
        return value
    if name in UNSPLIT:
        values = (value,) if isinstance(value, str) else tuple(value)
        return values[0] if name == "api_key" and len(values) == 1 else values  # as most programs give it
    parts = split_commas([value] if isinstance(value, str) else value)
    try:
        return msgspec.convert([part for part in parts if part], annotation, strict=False)
    except msgspec.ValidationError as error:
        flag, reason = f"--{name.replace('_', '-')}", str(error).split(" - at")[0]
        raise ConfigError(f"{flag} {','.join(parts)}: {reason}; separate values by commas") from None


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def type_name(annotation: Any) -> str:
    """Return a type as the docs write it: ``int``, ``a | b`` for choices, ``list of int``."""
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(annotation) is tuple:
        return f"list of {arguments[0].__name__}"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
    return str(annotation.__name__)
