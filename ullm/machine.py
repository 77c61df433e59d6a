"""Memory of the machine and of its container, and settings of Python's garbage collector."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNKNOWN_MEMORY = 4 << 30
"""Bytes of memory to assume where the system does not tell."""

YOUNG_OBJECTS = 20_000
"""Number of new objects, less those freed, after which garbage is collected."""


def available_memory() -> int:
    """Return the bytes of memory that this process can still use, within its container's limit."""
    free = _meminfo_available() or _physical_memory()
    limit = _read_int("/sys/fs/cgroup/memory.max")
    used = _read_int("/sys/fs/cgroup/memory.current")
    return min(free, limit - used) if limit is not None and used is not None else free


def resident_memory(pid: int) -> int:
    """Return the bytes of a process that are in memory; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process is gone, or this is not Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:")), 0)


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Exempt the modules imported in this block, and all earlier objects, from garbage collection.

    For entry points only, because it affects the whole process. Importing PyTorch makes half a million
    objects. Each collection that looks through them takes 0.1 s, during the import and later, in the middle
    of the process's work.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def collect_rarely() -> None:
    """Collect garbage less often; for entry points only, like `lasting_imports`.

    A step of a thousand sequences makes some thousand objects at once, which are freed at its end. Python's
    own threshold of 700 starts several collections within each such burst, and every hundredth of them
    visits all objects of all streams: with 1,000 streams, two fifths of a front end's time in pauses of up
    to 0.2 s. Garbage that only a collection can find takes a few megabytes until then.
    """
    gc.set_threshold(YOUNG_OBJECTS)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _physical_memory() -> int:
    if sys.platform == "win32":  # which has no sysconf
        return UNKNOWN_MEMORY
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return UNKNOWN_MEMORY


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such control group file, or "max"
        return None
