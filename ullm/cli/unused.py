"""Options on the command line that would have no effect there: refused, by their names.

Variables and the configuration file serve all commands, of which each takes what it can use.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ullm.config import LINK_FILES, EngineConfig
from ullm.errors import UsageError

FOR_ANY_SERVER = frozenset({"model", "log_level", "log_format"})
"""Options of `EngineConfig` that are of use to a client, too."""


def refuse_beside_url(url: str | None, options: Mapping[str, Any], api_key: str | None) -> None:
    """Check that the command line of a client has no options that only the server could follow.

    Args:
        api_key: for the server at ``url``; without one, only a variable may have set it.

    Raises:
        UsageError: it has some; names them.
    """
    if url is None and api_key is not None and api_key != os.environ.get("ULLM_API_KEY"):
        raise UsageError("--api-key has no effect without --url; leave it out")
    known = {spec.name for spec in dataclasses.fields(EngineConfig)} - FOR_ANY_SERVER
    given = [_flag(name) for name in options if name in known]
    if url is not None and given:
        raise UsageError(f"no effect with --url: {', '.join(given)}; give that to the server")


def refuse_beside_raw(raw: bool, system: str | None) -> None:
    """Check that a text that is continued as it is has no system message beside it.

    Raises:
        UsageError: it has one.
    """
    if raw and system is not None:
        raise UsageError("--system has no effect with --raw; write it into the prompt")


def without_link_files(config: EngineConfig, options: Mapping[str, Any]) -> EngineConfig:
    """Return the configuration of a command without front ends, which needs no link files on one host.

    Raises:
        UsageError: the command line has some; names them.
    """
    if config.nnodes > 1:
        return config
    if given := [_flag(name) for name in LINK_FILES if name in options]:
        raise UsageError(
            f"no effect without --nnodes, except in ullm serve: {', '.join(given)}; leave it out"
        )
    return dataclasses.replace(config, link_certfile=None, link_keyfile=None, link_ca_file=None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
