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

GIVE_WAY = 5
"""Added to the niceness, as by nice(1): a third of what others get. With less, a spare worker would never
be ready on a busy machine."""
LEAST_PRIORITY = 19
AUTOGROUP = Path("/proc/self/autogroup")
"""See sched(7)."""


def import_gently(module: str) -> None:
    """Import a module at a low priority; what goes wrong is left for a plain import to find."""
    if sys.platform != "linux":
        return
    thread = threading.Thread(target=_import, args=(module,), name="import", daemon=True)
    with _group_gives_way():
        thread.start()
        thread.join()  # signals are handled meanwhile


def _import(module: str) -> None:
    thread = threading.get_native_id()
    niceness = os.getpriority(os.PRIO_PROCESS, thread) + GIVE_WAY
    os.setpriority(os.PRIO_PROCESS, thread, min(niceness, LEAST_PRIORITY))
    with suppress(Exception):
        importlib.import_module(module)


@contextmanager
def _group_gives_way() -> Iterator[None]:
    try:
        niceness = int(AUTOGROUP.read_text().split()[-1])  # "/autogroup-25 nice 0"
    except (OSError, ValueError, IndexError):  # not configured
        yield
        return
    _set_group(min(niceness + GIVE_WAY, LEAST_PRIORITY))
    try:
        yield
    finally:
        _set_group(niceness)


def _set_group(niceness: int) -> None:
    with suppress(OSError):  # not allowed, or too often
        AUTOGROUP.write_text(str(niceness))
