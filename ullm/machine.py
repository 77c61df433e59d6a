"""What the machine has to give, its container's limits included, and how not to waste it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNKNOWN_MEMORY = 4 << 30
"""Bytes to assume where the system does not say."""

YOUNG_OBJECTS = 20_000
"""Objects made, and not yet gone, after which garbage is looked for."""


def available_memory() -> int:
    """Bytes that this process could still use, its container's limit included."""
    free = _meminfo_available() or _physical_memory()
    limit = _read_int("/sys/fs/cgroup/memory.max")
    used = _read_int("/sys/fs/cgroup/memory.current")
    return min(free, limit - used) if limit is not None and used is not None else free


def resident_memory(pid: int) -> int:
    """Bytes of a process that are in memory; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it is gone, or this is not Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:")), 0)


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Import what stays until the end of the process. For entry points, because it is about all objects.

    Importing PyTorch makes half a million objects. Looking through them for garbage costs 0.1 s while they
    are imported, and as much each time later, in the middle of whatever the process then does.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def collect_rarely() -> None:
    """Look for garbage less often. For entry points, like `lasting_imports`.

    A step of a thousand sequences makes some thousand objects at once, which are gone with the step. By
    Python's own threshold of 700 each such burst is looked through several times, and all objects of all
    streams with every hundredth time: with 1,000 streams two fifths of a front end's time, in pauses of up
    to 0.2 s. Garbage that only a collection finds takes some megabytes until then.
    """
    gc.set_threshold(YOUNG_OBJECTS)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return UNKNOWN_MEMORY


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such control group file, or "max"
        return None
