"""Where the configuration's values come from: ``ULLM_*`` variables, and a file in TOML."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
import re
import tomllib
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from ullm.config import EngineConfig, ServerConfig
from ullm.errors import ConfigError

CONFIG_VARIABLE = "ULLM_CONFIG"
"""Names the file where ``--config`` does not."""
SAMPLING_FIELDS = (
    "max_tokens temperature top_p top_k min_p seed stop stop_token_ids ignore_eos min_tokens "
    "include_stop_str_in_output repetition_penalty presence_penalty frequency_penalty "
    "skip_special_tokens timeout"
).split()
"""Fields of `SamplingParams` that commands take as options, and the file for them."""

_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+", re.IGNORECASE)
"""The value of a variable by which Kubernetes tells a pod where a Service is."""

log = logging.getLogger(__name__)

C = TypeVar("C", EngineConfig, ServerConfig)


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file: options by their names, with dashes or underscores, as in ``max-bs = 8``.

    One file serves all commands: each takes what it has an option for.

    Args:
        path: where it is, for errors.
        values: field → value, as TOML has it. Not shown, because keys may be among them.
    """

    path: str
    values: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: str) -> ConfigFile:
        """Read a file.

        Raises:
            ConfigError: it cannot be read, is not TOML, or has a name that is no option's.
        """
        try:
            with open(path, "rb") as file:
                found = tomllib.load(file)
        except OSError as error:
            raise ConfigError(f"--config {path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {path}: not TOML: {error}") from None
        values: dict[str, Any] = {}
        for name, value in found.items():
            key = name.replace("-", "_")
            if key in values:
                raise ConfigError(f"--config {path}: {name} is given twice, with - and with _")
            if key not in _names():
                raise ConfigError(f"--config {path}: {_unknown(name, value)}")
            values[key] = value
        return cls(path, values)

    def values_of(self, cls: type[Any], names: Collection[str] | None = None) -> dict[str, Any]:
        """Return the values for a dataclass's fields, or for some of them, each of its field's type.

        Raises:
            ConfigError: a value of another type; names the file and the option.
        """
        known = {spec.name for spec in dataclasses.fields(cls)}
        wanted = known if names is None else known.intersection(names)
        return {key: self._converted(cls, key) for key in self.values if key in wanted}

    def _converted(self, cls: type[Any], name: str) -> Any:
        try:
            return converted(cls, name, self.values[name], strict=True)
        except msgspec.ValidationError as error:
            raise ConfigError(f"--config {self.path}: {_dashed(name)}: {_reason(error)}") from None


def from_env(
    cls: type[C], environ: Mapping[str, str] = os.environ, file: ConfigFile | None = None, **overrides: Any
) -> C:
    """Build ``cls`` from a file, ``ULLM_<FIELD>`` variables, and ``overrides``; of these the last one wins.

    Lists are separated by commas, but a secret is one value. An empty variable counts as unset. Variables
    that name no field of ``cls`` are ignored, because the engine and the server share the prefix. So are
    those that Kubernetes sets for a Service called ullm, as in ``ULLM_PORT=tcp://10.96.12.7:8000``; a log
    line says so.

    Args:
        file: the configuration file; None: the one that ``ULLM_CONFIG`` names, if any.

    Raises:
        ConfigError: a value that cannot be used; names the variable, or the file.
    """
    if file is None and environ.get(CONFIG_VARIABLE):
        file = ConfigFile.read(environ[CONFIG_VARIABLE])
    of_file = {} if file is None else file.values_of(cls)
    of_variables = _from_variables(cls, environ, overrides)
    origins = {name: file.path for name in of_file} if file is not None else {}
    origins |= {name: f"ULLM_{name.upper()}" for name in of_variables}
    try:
        return cls(**{**of_file, **of_variables, **overrides})
    except ConfigError as error:
        unseen = {name: origin for name, origin in origins.items() if name not in overrides}
        raise type(error)(_with_origins(str(error), unseen)) from None


def _from_variables(cls: type[C], environ: Mapping[str, str], overrides: Collection[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(cls):
        name = f"ULLM_{spec.name.upper()}"
        text = environ.get(name, "")
        if not text or spec.name in overrides:
            continue
        if _SERVICE_LINK.fullmatch(text) and not spec.metadata["secret"]:
            log.warning(
                "%s=%s ignored: Kubernetes sets it for a Service; enableServiceLinks: false in the pod's "
                "spec avoids that",
                name,
                text,
            )
            continue
        lists = "tuple" in str(spec.type) and not spec.metadata["secret"]
        value: Any = [part.strip() for part in text.split(",") if part.strip()] if lists else text
        try:
            values[spec.name] = converted(cls, spec.name, value, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{name}={text!r}: {_reason(error)}") from None
    return values


def converted(cls: type[Any], name: str, value: Any, *, strict: bool) -> Any:
    """Return a value in the type of a dataclass's field.

    Args:
        strict: do not take a text for a number.

    Raises:
        msgspec.ValidationError: it has another type; shows no value.
    """
    single = msgspec.defstruct(f"One_{name}", [(name, _hints(cls)[name])])
    return getattr(msgspec.convert({name: value}, single, strict=strict), name)


_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
"""Field → its type; finding out takes a millisecond."""


@functools.cache
def _names() -> Mapping[str, str]:
    """Return field → option, for all options that a file may have."""
    fields = [*dataclasses.fields(EngineConfig), *dataclasses.fields(ServerConfig)]
    return {name: _dashed(name) for name in (*(spec.name for spec in fields), *SAMPLING_FIELDS)}


@functools.cache
def _aliases() -> Mapping[str, str]:
    """Return further name → option: vLLM's names, which are names of flags only."""
    fields = [*dataclasses.fields(EngineConfig), *dataclasses.fields(ServerConfig)]
    return {
        alias.lstrip("-"): _dashed(spec.name)
        for spec in fields
        for alias in spec.metadata["aliases"]
        if alias.startswith("--")
    }


def _unknown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"there are no tables, such as [{name}]; write all options at the top"
    candidates = {option: option for option in _names().values()} | dict(_aliases())
    nearest = difflib.get_close_matches(_dashed(name.lower()), candidates, n=1)
    hint = f"; is {candidates[nearest[0]]} meant?" if nearest else ""
    return f"{name} is no option{hint}"


def _with_origins(line: str, origins: Mapping[str, str]) -> str:
    """Return an error line in which an option that was not on the command line says where it comes from."""
    for name, origin in origins.items():
        before, flag, after = line.partition(f"--{_dashed(name)}")
        if flag and not re.match(r"[\w-]", after):
            line = f"{before}{flag} ({origin}){after}"
    return line


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _reason(error: msgspec.ValidationError) -> str:
    return str(error).split(" - at")[0]
