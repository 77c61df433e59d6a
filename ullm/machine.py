"""Memory and cores of the machine and of its container, and settings of Python's garbage collector."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
"""The usual place of control groups, and in most containers the container's own."""

UNKNOWN_MEMORY = 4 << 30
"""Bytes of memory to assume where the system does not tell."""

YOUNG_OBJECTS = 20_000
"""Number of new objects, less those freed, after which garbage is collected."""


def available_memory(process: Path = Path("/proc/self"), root: Path = CGROUP_ROOT) -> int:
    """Return the bytes of memory that this process can still use, within the limits of its control groups
    and of its address space (``ulimit -v``).

    Of each group and of all above it the limit counts, less what is in use, less inactive page cache, which
    the kernel gives up first: files that were read, such as weights, fill a group up to its limit.

    Args:
        process: the process's folder in /proc.
        root: a group that counts in any case.
    """
    free = _meminfo_available() or _physical_memory()
    groups = {*_groups(process, "memory"), root}
    lefts = [*(_memory_left(group) for group in groups), _address_space_left(process)]
    return max(0, min([free, *(left for left in lefts if left is not None)]))


def open_memory(name: str, size: int) -> int:
    """Return the descriptor of zeros that no folder has; the system frees them with the last that uses them.

    Args:
        name: what the system shows it by.

    Raises:
        OSError: there is no room, or the system has no such memory.
    """
    if sys.platform != "linux":
        raise OSError("memory without a name is only known on Linux")
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def memory_limit(process: Path = Path("/proc/self"), root: Path = CGROUP_ROOT) -> int | None:
    """Return the least limit of memory of this process's control groups, in bytes; None if there is none.

    Args:
        process: the process's folder in /proc.
        root: a group that counts in any case.
    """
    groups = {*_groups(process, "memory"), root}
    return min((limit for group in groups if (limit := _memory_limit(group)) is not None), default=None)


def usable_cores() -> int:
    """Return how many threads can compute at once: the cores that affinity and quotas leave, at least one.

    A quota is rounded up: with 1.5 cores, one thread would leave a third of the time unused.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def arm_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return optional features of this ARM processor, by Linux's names; none on other processors.

    Of macOS only those that the kernels use are known: https://docs.kernel.org/arch/arm64/elf_hwcaps.html and
    https://developer.apple.com/documentation/kernel/1387446-sysctlbyname.
    """
    if sys.platform == "darwin":
        return frozenset(name for name, key in _APPLE_FEATURES.items() if _sysctl(key))
    with suppress(OSError):
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("Features"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


_APPLE_FEATURES = {
    "asimddp": b"hw.optional.arm.FEAT_DotProd",
    "bf16": b"hw.optional.arm.FEAT_BF16",
    "i8mm": b"hw.optional.arm.FEAT_I8MM",
}


def _sysctl(name: bytes) -> int:
    value = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0)
    return value.value


def cpu_quota(process: Path = Path("/proc/self")) -> float | None:
    """Return the least quota of this process's control groups, in cores; None if there is none.

    Reads ``cpu.max`` of version 2 and ``cpu.cfs_quota_us`` of version 1, see
    https://docs.kernel.org/admin-guide/cgroup-v2.html and
    https://docs.kernel.org/scheduler/sched-bwc.html.

    Args:
        process: the process's folder in /proc.
    """
    quotas = [quota for folder in _groups(process, "cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _groups(process: Path, controller: str) -> Iterator[Path]:
    """Iterate over the folders of the control groups that limit this process, and of all above them.

    Args:
        controller: which of version 1's hierarchies: ``cpu`` or ``memory``.
    """
    try:
        groups = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in groups)}
    for mount in control_group_mounts(mounts, controller):
        if mount.version == 2:
            path = paths.get("", "/")
        else:
            path = next((path for names, path in paths.items() if controller in names.split(",")), "/")
        # Inside a container the mount may begin at the container's own group.
        inside = path.removeprefix(mount.root.rstrip("/")).strip("/")
        folder = mount.point / inside
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount.point))


@dataclass(frozen=True)
class ControlGroupMount:
    """Where control groups that may limit a resource are mounted.

    Args:
        root: the group that is mounted there.
        version: 1 or 2; in version 2 the resource's controller may be missing.
    """

    root: str
    point: Path
    version: int


def control_group_mounts(mountinfo: Iterable[str], controller: str = "cpu") -> Iterator[ControlGroupMount]:
    """Iterate over the mounts that may limit processor time, or another resource.

    Args:
        mountinfo: lines of /proc/self/mountinfo, see proc_pid_mountinfo(5).
        controller: which of version 1's hierarchies: ``cpu`` or ``memory``.
    """
    for line in mountinfo:
        mount, _, filesystem = line.partition(" - ")
        root, point = mount.split()[3:5]
        kind, _, options = filesystem.split(maxsplit=2)
        if kind == "cgroup2":
            yield ControlGroupMount(root, Path(point), 2)
        elif kind == "cgroup" and controller in options.split(","):
            yield ControlGroupMount(root, Path(point), 1)


def _quota(group: Path) -> float | None:
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = (
        _read_int(str(group / "cpu.cfs_quota_us")),
        _read_int(str(group / "cpu.cfs_period_us")),
    )
    return quota_us / period_us if quota_us is not None and period_us and quota_us > 0 else None


def _memory_left(group: Path) -> int | None:
    """Return what a group may still use; None if it has no limit.

    Reads ``memory.max``, ``memory.high``, above which the group is slowed down, and ``memory.current`` of
    version 2, and their counterparts of version 1.
    """
    limit = _memory_limit(group)
    used = [_read_int(str(group / f"memory.{name}")) for name in ("current", "usage_in_bytes")]
    in_use = next((each for each in used if each is not None), None)
    if limit is None or in_use is None:
        return None
    return limit - max(0, in_use - _inactive_files(group))


def _memory_limit(group: Path) -> int | None:
    limits = [_read_int(str(group / f"memory.{name}")) for name in ("max", "high", "limit_in_bytes")]
    return min((each for each in limits if each is not None and each < _NO_LIMIT), default=None)


_NO_LIMIT = 1 << 60
"""Version 1 has no word for it: the limit is then the largest multiple of a page."""


def _inactive_files(group: Path) -> int:
    """Return the bytes of page cache that a group, with those below it, has not used lately."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        entries = {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):
        return 0
    return entries.get("total_inactive_file", entries.get("inactive_file", 0))


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


def _address_space_left(process: Path) -> int | None:
    """Return how many bytes the process may still map; None if that is not limited, or not known."""
    try:
        lines = (process / "limits").read_text().splitlines()
        pages = int((process / "statm").read_text().split()[0])
    except OSError:  # not Linux
        return None
    name = "Max address space"
    limit = next((line.removeprefix(name).split()[0] for line in lines if line.startswith(name)), "unlimited")
    return int(limit) - pages * mmap.PAGESIZE if limit.isdigit() else None


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
