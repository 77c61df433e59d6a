"""What a test must not leave behind: processes, shared memory, files, sockets, descriptors."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psutil import Process

SECONDS = 10.0
"""How long whatever is on its way out may take; waited for only where something is left."""

SHARED_MEMORY = Path("/dev/shm")

_POLL = 0.01
_SEGMENT = "shared memory"
_PATIENCE = 0.05
"""Seconds after which garbage is collected, which takes longer than most processes take to end."""
_NAMES_OF_SEGMENTS = ("psm_", "sem.", "torch_", "gloo", "nccl")
"""How names begin that Python and torch give to segments."""
_DESCRIPTORS = (Path("/proc/self/fd"), Path("/dev/fd"))


def import_psutil() -> Any:
    """Return the library psutil.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import psutil
    except ModuleNotFoundError:
        raise RuntimeError("to look for leaks, ullm.testing needs psutil: pip install psutil") from None
    return psutil


class LeakCheck:
    """Remembers what this process has, and finds later what it has beyond that.

    Looks only at what is this process's own: its descendants, its descriptors, segments of shared memory
    that one of them maps or that were made with names of Python's or torch's and are mapped by nobody.
    Other programs, and other workers of pytest-xdist, may do beside it what they like.

    Args:
        folder: where temporary files go, see `temporary_folder`; must be empty at the end.

    Raises:
        RuntimeError: psutil is not installed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        psutil = import_psutil()
        self._folder = folder
        self._self: Process = psutil.Process()
        self._children = set(self._processes())
        self._shared = _shared_memory()
        self._listening = set(self._sockets())
        self._descriptors = _descriptors()

    def leaks(self) -> list[str]:
        """Return one line for each thing that is left; empty if there is none."""
        if not (left := self._look()):
            return []
        gc.collect()  # what hangs in a cycle of garbage is not left: it is only not collected yet
        return self._look_again(left)

    def check(self, seconds: float = SECONDS) -> None:
        """Wait until nothing is left.

        Raises:
            AssertionError: something still is after `seconds` seconds; names it.
        """
        began = time.monotonic()
        collected = False
        left = self._look()
        while left:
            waited = time.monotonic() - began
            if collected and waited > seconds:
                raise AssertionError("left behind: " + "; ".join(left))
            if not collected and waited > min(seconds, _PATIENCE):
                gc.collect()
                collected = True
            time.sleep(_POLL)
            left = self._look_again(left)

    def _look_again(self, before: list[str]) -> list[str]:
        """Look, without segments that were not there before: other programs' come and go."""
        return [line for line in self._look() if line in before or not line.startswith(_SEGMENT)]

    def _look(self) -> list[str]:
        processes = self._processes()
        known = self._children | self._trackers()
        new = [pid for pid in processes if pid not in known and not self._is_below_known(pid)]
        left = [f"child process {pid} {processes[pid]}" for pid in new]
        left += [
            f"{_SEGMENT} {name}"
            for name in sorted(_shared_memory() - self._shared)
            if _is_own(name, {os.getpid(), *processes})
        ]
        left += [f"listening socket {text}" for text in sorted(set(self._sockets()) - self._listening)]
        left += [f"temporary file {path}" for path in sorted(self._temporary())]
        return left + self._new_descriptors(len(self._trackers() - self._children))

    def _new_descriptors(self, expected: int) -> list[str]:
        """Descriptors that were not there before, but for `expected` pipes to a resource tracker."""
        now = _descriptors()
        new = sorted(number for number in now if self._descriptors.get(number) != now[number])
        if expected:
            pipes = [number for number in new if now[number].startswith("pipe:")][:expected]
            new = [number for number in new if number not in pipes]
        return [f"file descriptor {number} → {now[number]}" for number in new]

    def _processes(self) -> dict[int, str]:
        psutil = import_psutil()
        names = {}
        for process in self._self.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended since
                names[process.pid] = process.name()
        return names

    def _is_below_known(self, pid: int) -> bool:
        """Return whether a process that was there before has started it: that one answers for it."""
        psutil = import_psutil()
        try:
            return any(parent.pid in self._children for parent in psutil.Process(pid).parents())
        except psutil.NoSuchProcess:  # it has ended since
            return True

    def _trackers(self) -> set[int]:
        """Python's own help for shared memory: one process, and one pipe to it, until Python ends."""
        psutil = import_psutil()
        trackers = set()
        for process in self._self.children():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if any("multiprocessing.resource_tracker" in part for part in process.cmdline()):
                    trackers.add(process.pid)
        return trackers

    def _sockets(self) -> list[str]:
        connections = self._self.net_connections(kind="inet")
        return [f"{c.laddr.ip}:{c.laddr.port}" for c in connections if c.status == "LISTEN"]

    def _temporary(self) -> list[str]:
        return [str(path) for path in self._folder.iterdir()] if self._folder is not None else []


@contextmanager
def temporary_folder(folder: Path) -> Iterator[None]:
    """Have temporary files of this process, and of those that it starts, made in a folder of their own."""
    names = ("TMPDIR", "TEMP", "TMP")
    environ, default = {name: os.environ.get(name) for name in names}, tempfile.tempdir
    os.environ.update(dict.fromkeys(names, str(folder)))
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = default
        for name, value in environ.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _shared_memory() -> set[str]:
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def _is_own(name: str, processes: set[int]) -> bool:
    """Return whether a segment is these processes', or may be what one of them left when it was killed."""
    if holders := _holders(name):
        return bool(holders & processes)
    try:
        uid = (SHARED_MEMORY / name).stat().st_uid
    except FileNotFoundError:  # it has been removed since
        return False
    own = sys.platform != "win32" and uid == os.getuid()
    return own and name.startswith(_NAMES_OF_SEGMENTS)


def _holders(name: str) -> set[int]:
    """Return the processes that have mapped a segment.

    By its inode: the kernel shows the name that a file had when it was mapped, and a semaphore gets its own
    only after that (glibc's sem_open).
    """
    if sys.platform == "win32":  # where there is no such folder
        return set()
    try:
        status = (SHARED_MEMORY / name).stat()
    except FileNotFoundError:  # it has been removed since
        return set()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x} {status.st_ino} "
    return {int(file.parent.name) for file in Path("/proc").glob("[0-9]*/maps") if device in _maps(file)}


def _maps(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:  # gone meanwhile, or another user's
        return ""


def _descriptors() -> dict[int, str]:
    """Return this process's open descriptors, and what each stands for as far as the system tells."""
    folder = next((path for path in _DESCRIPTORS if path.is_dir()), None)
    if folder is None:  # Windows: only their number is known
        return dict.fromkeys(range(import_psutil().Process().num_handles()), "handle")
    found = {int(name): _target(folder / name) for name in os.listdir(folder)}
    return {number: target for number, target in found.items() if target}


def _target(entry: Path) -> str:
    """Return what a descriptor stands for; empty for the one that was open to list them."""
    try:
        return os.readlink(entry)
    except FileNotFoundError:
        return ""
    except OSError:
        return "?"
