"""What a test must not leave behind: processes, shared memory, files, sockets, descriptors."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psutil import Process

SECONDS = 2.0
"""How long whatever is on its way out may take: the kernel and reapers are not at once."""

SHARED_MEMORY = Path("/dev/shm")

_POLL = 0.01


def import_psutil() -> Any:
    """The library psutil.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import psutil
    except ModuleNotFoundError:
        raise RuntimeError("to look for leaks, ullm.testing needs psutil: pip install psutil") from None
    return psutil


class LeakCheck:
    """Remembers how this process is, and tells later what is there that was not.

    Args:
        folder: where temporary files go, see `temporary_folder`; must be empty at the end.

    Raises:
        RuntimeError: psutil is not installed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        psutil = import_psutil()
        self._folder = folder
        self._self: Process = psutil.Process()
        gc.collect()
        self._children = set(self._processes())
        self._shared = _shared_memory()
        self._listening = set(self._sockets())
        self._descriptors = self._count_descriptors()

    def leaks(self) -> list[str]:
        """One line for each thing that is left; empty if there is none."""
        gc.collect()
        processes = self._processes()
        known = self._children | self._trackers()
        new = [pid for pid in processes if pid not in known and not self._is_below_known(pid)]
        found = [f"child process {pid} {processes[pid]}" for pid in new]
        own = {os.getpid(), *processes}
        found += [
            f"shared memory {name}"
            for name in sorted(_shared_memory() - self._shared)
            if not _holders(name) - own
        ]
        found += [f"listening socket {text}" for text in sorted(set(self._sockets()) - self._listening)]
        found += [f"temporary file {path}" for path in sorted(self._temporary())]
        more = self._count_descriptors() - self._descriptors - len(self._trackers() - self._children)
        return found + ([f"{more} more file descriptors: {self._describe_descriptors()}"] if more > 0 else [])

    def check(self, seconds: float = SECONDS) -> None:
        """Wait until nothing is left.

        Raises:
            AssertionError: something is, after so many seconds; says what.
        """
        deadline = time.monotonic() + seconds
        while found := self.leaks():
            if time.monotonic() > deadline:
                raise AssertionError("left behind: " + "; ".join(found))
            time.sleep(_POLL)

    def _processes(self) -> dict[int, str]:
        psutil = import_psutil()
        found = {}
        for process in self._self.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended since
                found[process.pid] = process.name()
        return found

    def _is_below_known(self, pid: int) -> bool:
        """Whether a process that was there before has started it: what that one does is its own matter."""
        psutil = import_psutil()
        try:
            return any(parent.pid in self._children for parent in psutil.Process(pid).parents())
        except psutil.NoSuchProcess:  # it has ended since
            return True

    def _trackers(self) -> set[int]:
        """Python's own help for shared memory: one process, and one pipe to it, until Python ends."""
        psutil = import_psutil()
        found = set()
        for process in self._self.children():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if any("multiprocessing.resource_tracker" in part for part in process.cmdline()):
                    found.add(process.pid)
        return found

    def _sockets(self) -> list[str]:
        connections = self._self.net_connections(kind="inet")
        return [f"{c.laddr.ip}:{c.laddr.port}" for c in connections if c.status == "LISTEN"]

    def _temporary(self) -> list[str]:
        return [str(path) for path in self._folder.iterdir()] if self._folder is not None else []

    def _count_descriptors(self) -> int:
        count: int = self._self.num_fds() if os.name == "posix" else self._self.num_handles()
        return count

    def _describe_descriptors(self) -> str:
        """The newest ones, as far as the system names them."""
        folder = Path("/proc/self/fd")
        names = [(int(entry.name), _target(entry)) for entry in folder.iterdir()] if folder.is_dir() else []
        return ", ".join(f"{number} → {target}" for number, target in sorted(names)[-10:])


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


def _holders(name: str) -> set[int]:
    """Processes that have mapped a segment: those of other users of the machine are not our leaks."""
    path = str(SHARED_MEMORY / name)
    return {int(file.parent.name) for file in Path("/proc").glob("[0-9]*/maps") if path in _maps(file)}


def _maps(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:  # gone meanwhile, or somebody else's
        return ""


def _target(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:
        return "?"
