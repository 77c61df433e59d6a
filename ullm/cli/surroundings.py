"""What ``ullm doctor`` says of what surrounds ullm: variables, caches, the model hub."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from ullm.hub.caches import entries
from ullm.system.interpreter import SECRET_VARIABLES

HUB_TIMEOUT = 2.0
"""Seconds for the model hub to answer."""


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the ``ULLM_*`` variables that are set, without the values of keys."""
    return {
        name: "(hidden)" if name in SECRET_VARIABLES else value
        for name, value in sorted(environ.items())
        if name.startswith("ULLM_") and value
    }


def cache_sizes() -> dict[str, int]:
    """Return kind of cache → bytes."""
    sizes: dict[str, int] = {}
    for entry in entries()[0]:
        sizes[entry.kind] = sizes.get(entry.kind, 0) + entry.bytes
    return sizes


def hub_state(timeout: float = HUB_TIMEOUT) -> dict[str, Any]:
    """Ask the model hub for a sign of life; return its URL, and what is wrong or None.

    Args:
        timeout: seconds for all of it; looking up its name has no limit of its own.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return {"url": constants.ENDPOINT, "problem": "not asked, because HF_HUB_OFFLINE is set"}
    problems = [f"no answer within {timeout:g} s"]

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=timeout).status_code
        except Exception as error:  # whatever the client raises is the answer
            problems.append(" ".join(str(error).split()) or type(error).__name__)
        else:
            problems.append("" if status < 500 else f"HTTP status {status}")

    asking = threading.Thread(target=ask, name="ullm-hub", daemon=True)
    asking.start()
    asking.join(timeout)
    return {"url": constants.ENDPOINT, "problem": problems[-1] or None}
