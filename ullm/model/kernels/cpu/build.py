"""Compile the kernels for this CPU once and keep the library in the user's cache.

Measured on two cores in bfloat16 with one row of SmolLM2: the calls between the matrix products take 2.6 ms
less per step than in PyTorch, and the products 3.9 ms less; see docs/explanation/performance.md. Without a
compiler, and on Windows, the model runs without the kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import filelock

from ullm.hub import cache_dir
from ullm.hub.guarded import end_guarded, open_guarded
from ullm.logs import get_logger
from ullm.machine import arm_features, usable_cores
from ullm.model.kernels.cpu.library_file import is_intact, keep, open_folder

log = get_logger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("quantized.cpp", "attention.cpp", "linear.cpp", "layer.cpp", "choose.cpp", "exchange.cpp")
HEADERS = ("common.h", "dot.h", "exchange.h", "layer.h", "matrix.h", "pool.h", "tiles.h")
NATIVE = (
    ("-mcpu=native",)
    if platform.machine() in ("aarch64", "arm64")
    else ("-march=native", "-mprefer-vector-width=512")
)
"""Flags for what this processor has; GCC and Clang know no ``-march=native`` on every ARM system."""
FLAGS = (
    *NATIVE,
    *("-O3", "-std=c++20", "-pthread", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),  # needed to vectorize
    "-Wno-psabi",
)
CPUINFO = Path("/proc/cpuinfo")
COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 400.0
"""Limit of one start, less than ``--start-timeout``: compiling takes 20 to 40 s of a processor, and a
container may have a fraction of one."""
HEARTBEAT, POLL_SECONDS = 0.25, 0.05
"""Seconds between looks at another process's lock, and at the compilers."""
_PARTIAL = ".partial"
_CPU_LINES = ("flags", "Features", "model name", "CPU implementer", "CPU part")
"""Lines of /proc/cpuinfo: the last two are ARM's model names."""


class NoLibrary(Exception):
    """The kernels are not available; the message says why, and the remedy."""


def open_library(progress: Callable[[], None] = lambda: None) -> ctypes.CDLL | None:
    """Return the compiled kernels; None, and a log line, if they are not available.

    Args:
        progress: called several times a second while they are compiled, by this process or another one.
    """
    try:
        return require_library(progress)
    except NoLibrary as error:
        level = logging.INFO if find_compiler() is None else logging.WARNING
        log.log(level, "decoding without fused kernels", reason=str(error))
        return None


def why_no_library() -> str:
    """Return why the kernels are not available, and the remedy; empty if they are."""
    try:
        require_library()
    except NoLibrary as error:
        return str(error)
    return ""


def require_library(progress: Callable[[], None] = lambda: None) -> ctypes.CDLL:
    """Return the compiled kernels, compiling them if need be.

    Raises:
        NoLibrary: they are not available; says why.
    """
    compiler, path = find_compiler(), library_path()
    if compiler is None or path is None:
        names = os.environ.get("CXX") or ", ".join(COMPILERS)
        raise NoLibrary(f"there is no C++ compiler ({names}); install g++ or clang")
    try:
        open_folder(path.parent)
        if not is_intact(path):
            _compile_once(compiler, path, progress)
    except OSError as error:
        raise NoLibrary(
            f"they cannot be kept in {path.parent}: {error.strerror or error}; let this user write and run "
            "programs there, or set ULLM_CACHE to another folder"
        ) from None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibrary(
            f"they cannot be loaded: {error}; let this user run programs in {path.parent}, or set ULLM_CACHE "
            "to another folder"
        ) from None


def compiled_variant() -> str | None:
    """Return the instructions that the kernels use; None if they are not compiled yet, or cannot be."""
    path = library_path()
    if path is None or not path.exists():
        return None
    try:
        return variant(ctypes.CDLL(str(path)))
    except OSError:
        return None


def variant(library: ctypes.CDLL) -> str:
    """Return the instructions that compiled kernels use, such as ``AVX-512, VNNI, BF16``."""
    library.variant.restype = ctypes.c_char_p
    name: bytes = library.variant()
    return name.decode()


def library_path() -> Path | None:
    """Return the path of the compiled kernels, which may not exist yet; None without a compiler."""
    compiler = find_compiler()
    if compiler is None or os.name == "nt":
        return None
    return cache_dir() / "kernels" / f"{_key(compiler)}.so"


def find_compiler() -> str | None:
    """Return the C++ compiler: ``$CXX``, or the first of the usual ones that exists."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def _compile_once(compiler: str, path: Path, progress: Callable[[], None]) -> None:
    """Compile unless another process does; then wait for that one.

    Raises:
        NoLibrary: the compiler fails, or takes longer than `COMPILE_SECONDS`.
        OSError: the results cannot be kept.
    """
    deadline = time.monotonic() + COMPILE_SECONDS
    lock = filelock.FileLock(path.parent / ".lock", mode=0o600)
    while True:
        try:
            lock.acquire(timeout=HEARTBEAT)
            break
        except filelock.Timeout:
            progress()
            if time.monotonic() > deadline:
                raise NoLibrary(
                    f"another process has been compiling them for {COMPILE_SECONDS:g} s; start again later"
                ) from None
    try:
        if not is_intact(path):
            log.info("compiling fused kernels, once for this machine", compiler=compiler)
            _compile(compiler, path, _Patience(deadline, progress))
    finally:
        lock.release()


class _Patience(NamedTuple):
    """How long the compilers may take, and whom to tell that they still run."""

    deadline: float
    progress: Callable[[], None]


def _compile(compiler: str, path: Path, patience: _Patience) -> None:
    """Compile each source, then link; what was compiled before a start was cut short is used again."""
    key = path.stem
    for left in path.parent.glob(f"*{_PARTIAL}"):  # of a process that was killed: this one has the lock
        left.unlink(missing_ok=True)
    objects = {path.with_name(f"{key}.{name}.o"): name for name in SOURCES}
    _run_all(
        {
            to: [compiler, *FLAGS, "-pipe", "-c", str(FOLDER / name)]
            for to, name in objects.items()
            if not is_intact(to)
        },
        patience,
    )
    try:
        _run_all({path: [compiler, *FLAGS, "-shared", *map(str, objects)]}, patience)
    finally:
        for left in path.parent.glob(f"{key}.*.o*"):
            left.unlink(missing_ok=True)


def _run_all(commands: Mapping[Path, list[str]], patience: _Patience) -> None:
    """Run compilers side by side, one for each file to make, and keep each file as soon as it is made.

    They are started in another thread: the signal that ends a worker raises an exception in the main one,
    also in the middle of starting a process, which then nobody would know of.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, "compilers") as pool:
        try:
            made = pool.submit(_make_all, commands, patience.deadline, stop)
            while not made.done():
                wait([made], POLL_SECONDS)
                patience.progress()
            made.result()
        finally:
            stop.set()


def _make_all(commands: Mapping[Path, list[str]], deadline: float, stop: threading.Event) -> None:
    waiting = list(commands.items())
    running: list[_Compilation] = []
    try:
        while (waiting or running) and not stop.is_set():
            while waiting and len(running) < usable_cores() and not stop.is_set():
                running.append(_Compilation(*waiting.pop(0)))
            stop.wait(POLL_SECONDS)
            if time.monotonic() > deadline:
                raise NoLibrary(
                    f"{running[0].command[0]} did not end within {COMPILE_SECONDS:g} s; what it has compiled "
                    "is kept for the next start"
                )
            running = [each for each in running if not each.finish()]
    finally:
        for each in running:
            each.abandon()


class _Compilation:
    """One compiler that runs; it does not outlive this process."""

    def __init__(self, path: Path, command: list[str]) -> None:
        self.path, self.command = path, command
        self.built = path.with_name(f"{path.name}{_PARTIAL}")
        self.errors = tempfile.TemporaryFile()
        self.process = open_guarded(
            [*command, "-o", str(self.built)], [self.built], stdout=subprocess.DEVNULL, stderr=self.errors
        )

    def finish(self) -> bool:
        """Keep what was made, if the compiler has ended; return whether it has.

        Raises:
            NoLibrary: it failed.
        """
        status = self.process.poll()
        if status is None:
            return False
        if status or not self.built.exists():
            self.errors.seek(0)
            output = self.errors.read().decode(errors="replace")
            said = " ".join(output.split())[-400:] or f"it ended with status {status}"
            raise NoLibrary(
                f"{self.command[0]} could not compile them: {said}; set CXX to another compiler, such as g++ "
                "or clang++, and make sure that its folder for temporary files and ULLM_CACHE have free space"
            )
        self.abandon(made=True)
        keep(self.built, self.path)
        return True

    def abandon(self, *, made: bool = False) -> None:
        """End the compiler, if it still runs; remove what it has begun."""
        end_guarded(self.process)
        self.errors.close()
        if not made:
            self.built.unlink(missing_ok=True)


def _key(compiler: str) -> str:
    """Return a digest of source, compiler and CPU: the cache may be on a disk that machines share."""
    parts = [(FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    parts += [text.encode() for text in (*FLAGS, compiler, str(os.stat(compiler).st_mtime), _cpu())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _cpu() -> str:
    """Describe the CPU as far as ``-march=native`` depends on it; macOS calls every processor ``arm``."""
    if not CPUINFO.exists():
        return " ".join([platform.machine(), platform.processor(), *sorted(arm_features())])
    lines = CPUINFO.read_text(errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(_CPU_LINES)}))
