"""How ullm starts Python: its modules come from where this process has them, never from a model's folder.

The working directory may be a cloned model repository, with files such as ``json.py`` or ``pip.py`` in it.
``python -m`` and an empty entry of ``PYTHONPATH`` would have the interpreter look there first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def python_command(*arguments: str) -> list[str]:
    """Return the command line of this interpreter, with the working directory off the module search path."""
    return [sys.executable, "-P", *arguments]


def python_environment() -> dict[str, str]:
    """Return this process's environment, with its module search path in ``PYTHONPATH``.

    The working directory comes last, so that modules of the user's own are found there, but shadow nothing;
    except where ullm itself lies in it, as in a checkout.
    """
    return dict(os.environ, PYTHONPATH=os.pathsep.join(module_search_path()))


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
