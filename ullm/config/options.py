"""How a configuration declares its options: a dataclass field with a help text each."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import field
from typing import Any, TypeVar

MINUTES = 60.0
GIB = 1 << 30
C = TypeVar("C")


def option(default: Any, help: str, *, aliases: tuple[str, ...] = (), secret: bool = False) -> Any:
    """Return a dataclass field with the help text that the command line and the docs show.

    Args:
        aliases: further names of the flag: those that vLLM gives to the same option.
        secret: no text form of the configuration shows it, no child process gets its variable, and a
            comma is part of the value.
    """
    return field(
        default=default, repr=not secret, metadata={"help": help, "aliases": aliases, "secret": secret}
    )


def explained(cls: type[C]) -> type[C]:
    """Add the meaning of each option to a class's docstring, for `help`; written once, in the fields."""
    if cls.__doc__:  # none with python -OO
        summary, _, rest = cls.__doc__.partition("\n\n")
        entries = (
            textwrap.fill(
                f"{spec.name}: {spec.metadata['help']}",
                100,
                initial_indent=" " * 8,
                subsequent_indent=" " * 12,
                break_on_hyphens=False,
            )
            for spec in dataclasses.fields(cls)  # type: ignore[arg-type]
        )
        arguments = "\n".join(["    Args:", *entries])
        cls.__doc__ = "\n\n".join(part for part in (summary, arguments, rest) if part)
    return cls
