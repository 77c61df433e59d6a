"""Importing while others serve.

What a standby worker imports takes most of a second of a core, which those who serve have better use for.
Only a privileged process may raise its priority again once it is lowered, so on Linux, where priority is a
thread's own, the import has a thread of its own. Sessions may also be scheduled as groups there, and a
worker leads a session; a group's priority can be raised to what it was by anybody.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOW_PRIORITY = 5
"""As in nice(1): a third of what others get. With less, a spare would never be ready on a busy machine."""
AUTOGROUP = Path("/proc/self/autogroup")
"""See sched(7)."""


def import_gently(module: str) -> None:
    """Import a module at a low priority; what goes wrong is left for a plain import to find."""
    if sys.platform != "linux":
        return
    thread = threading.Thread(target=_import, args=(module,), name="import", daemon=True)
    with _group_at_low_priority():
        thread.start()
        thread.join()  # signals are handled meanwhile


def _import(module: str) -> None:
    with suppress(Exception):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
        importlib.import_module(module)


@contextmanager
def _group_at_low_priority() -> Iterator[None]:
    _set_group_priority(LOW_PRIORITY)
    try:
        yield
    finally:
        _set_group_priority(0)


def _set_group_priority(nice: int) -> None:
    with suppress(OSError):  # not configured, or not allowed
        AUTOGROUP.write_text(str(nice))
