"""Imports at a low priority, for standby workers.

The imports of a standby worker take most of a second of a core, which workers in use need more. Only a
privileged process may raise its priority again, so on Linux, where each thread has a priority of its own, the
import runs in a thread. Linux may also schedule sessions as groups, and a worker leads a session; any process
may restore the priority of its group.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EXTRA_NICENESS = 5
"""Added to the niceness, as by nice(1): leaves a third of the usual share of a core. With a lower share, a
standby worker would never be ready on a busy machine."""
MAX_NICENESS = 19
AUTOGROUP = Path("/proc/self/autogroup")
"""See sched(7)."""


def import_at_low_priority(module: str) -> None:
    """Import a module at a low priority; errors are left for a later plain import to raise."""
    if sys.platform != "linux":
        return
    thread = threading.Thread(target=_import, args=(module,), name="import", daemon=True)
    with _group_at_low_priority():
        thread.start()
        thread.join()  # signals are still handled here


def _import(module: str) -> None:
    if sys.platform == "win32":
        raise AssertionError("only called on Linux")
    thread = threading.get_native_id()
    niceness = os.getpriority(os.PRIO_PROCESS, thread) + EXTRA_NICENESS
    os.setpriority(os.PRIO_PROCESS, thread, min(niceness, MAX_NICENESS))
    with suppress(Exception):
        importlib.import_module(module)


@contextmanager
def _group_at_low_priority() -> Iterator[None]:
    try:
        niceness = int(AUTOGROUP.read_text().split()[-1])  # "/autogroup-25 nice 0"
    except (OSError, ValueError, IndexError):  # the kernel has no autogroups
        yield
        return
    _set_group_niceness(min(niceness + EXTRA_NICENESS, MAX_NICENESS))
    try:
        yield
    finally:
        _set_group_niceness(niceness)


def _set_group_niceness(niceness: int) -> None:
    with suppress(OSError):  # not permitted, or changed too often
        AUTOGROUP.write_text(str(niceness))
