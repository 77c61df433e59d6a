"""Every command with its arguments and options, for docs/reference/command-line.md."""

from __future__ import annotations

from collections.abc import Iterator

from cyclopts import App
from cyclopts.argument import Argument

from tests.docs.docstrings import markdown, sentence, table
from ullm.cli.app import app
from ullm.cli.flags import Option, engine_options, sampling_options, server_options

CONFIGURATION = {"the engine": engine_options(), "the server": server_options()}
"""Options that the page of the configuration explains, by what they configure."""
SAMPLING = sampling_options({})
EXPLAINED = {
    (option.flag, option.help)
    for option in (*CONFIGURATION["the engine"], *CONFIGURATION["the server"], *SAMPLING)
}
"""Options that mean in a command what they mean in the configuration: the help is the same, too."""


def commands() -> str:
    """Return a section per command."""
    return "\n".join(_section(name, command) for name, command in all_commands())


def all_commands(parent: App = app, prefix: str = "ullm") -> Iterator[tuple[str, App]]:
    """Yield each command with the words that call it, by name."""
    for name in sorted(parent):
        command = parent[name]
        if name.startswith("-"):
            continue
        if command.default_command is None:
            yield from all_commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _section(name: str, command: App) -> str:
    arguments = [each for each in command.assemble_argument_collection() if each.show]
    positional = [each for each in arguments if not each.names[0].startswith("-")]
    usage = " ".join([name, *(f"[{each.names[0]}]" for each in positional), "[options]"])
    parts = [f"## {name}", command.help.split("\n")[0], f"```text\n{usage}\n```"]
    explained = {key for each in arguments if (key := _key(each)) in EXPLAINED}
    own = [_row(each) for each in arguments if _key(each) not in explained]
    parts += [table(["argument or option", "default", "meaning"], own).rstrip()] if own else []
    return "\n\n".join([*parts, *_references(explained)]) + "\n"


def _key(argument: Argument) -> tuple[str, str]:
    return argument.names[0], argument.parameter.help or ""


def _references(explained: set[tuple[str, str]]) -> Iterator[str]:
    """Yield which options of the configuration the command takes."""
    for subject, options in CONFIGURATION.items():
        taken = _flags(options, explained)
        if len(taken) == len(options):
            yield f"All options of {subject}: see [configuration](configuration.md)."
        elif taken:
            yield f"Of the options of {subject}: {', '.join(taken)}; see [configuration](configuration.md)."
    if taken := _flags(SAMPLING, explained):
        yield f"Sampling: {', '.join(taken)}; see [sampling](configuration.md#sampling)."


def _flags(options: list[Option], explained: set[tuple[str, str]]) -> list[str]:
    return [f"`{option.flag}`" for option in options if (option.flag, option.help) in explained]


def _row(argument: Argument) -> list[str]:
    default = argument.field_info.default
    shown = default if isinstance(default, str | int | float) and not isinstance(default, bool) else None
    names = ", ".join(f"`{name}`" for name in argument.names)
    return [
        names,
        "" if shown in (None, "") else f"`{shown}`",
        sentence(markdown(argument.parameter.help or "")),
    ]
