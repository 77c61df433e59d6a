"""The environment of a server under test: what is exported for other servers must not reach it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ullm.system.interpreter import python_environment

PLACES = frozenset({"ULLM_CACHE"})
"""Variables of ullm that configure no server: they say where files are."""


def environment_for_tests(environ: Mapping[str, str] = {}, **more: str) -> dict[str, str]:
    """Return this process's environment without ``ULLM_*`` options, and with variables of the test's own."""
    return without_options(dict(os.environ) | python_environment()) | dict(environ) | more


def without_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that configure ullm, or the script of a scripted model."""
    return {name: value for name, value in environ.items() if name in PLACES or not name.startswith("ULLM_")}
