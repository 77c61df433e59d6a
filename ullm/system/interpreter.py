"""How ullm starts Python: its modules come from where this process has them, never from a model's folder.

The working directory may be a cloned model repository, with files such as ``json.py`` or ``pip.py`` in it.
``python -m`` and an empty entry of ``PYTHONPATH`` would have the interpreter look there first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SECRET_VARIABLES = frozenset({"ULLM_API_KEY", "ULLM_ADMIN_KEY", "ULLM_ENGINE_KEY"})
"""Variables with keys: of the options that `ullm.config` marks as secret, and of the link to front ends."""


def python_command(*arguments: str) -> list[str]:
    """Return the command line of this interpreter, with the working directory off the module search path."""
    return [sys.executable, "-P", *arguments]


def python_environment() -> dict[str, str]:
    """Return this process's environment without keys, with its module search path in ``PYTHONPATH``.

    The working directory comes last, so that modules of the user's own are found there, but shadow nothing;
    except where ullm itself lies in it, as in a checkout.
    """
    return without_secrets() | {"PYTHONPATH": os.pathsep.join(module_search_path())}


def without_secrets(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment for a child process, without the keys that only the HTTP server needs."""
    return {name: value for name, value in environ.items() if name not in SECRET_VARIABLES}


def module_search_path() -> list[str]:
    """Return the entries of this process's module search path, in the order for its child processes."""
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it has been removed
        return [entry for entry in sys.path if entry]
    entries = list(dict.fromkeys(entry or here for entry in sys.path))
    if os.path.realpath(Path(__file__).parents[2]) == here:
        return entries
    return sorted(entries, key=lambda entry: os.path.realpath(entry) == here)
