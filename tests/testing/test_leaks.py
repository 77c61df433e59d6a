"""Whatever is left behind is found, and what is not, is not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from ullm.testing.leaks import SHARED_MEMORY, LeakCheck, import_psutil, temporary_folder

pytestmark = pytest.mark.process


@pytest.fixture
def check(tmp_path: Path) -> Iterator[LeakCheck]:
    with temporary_folder(tmp_path):
        found = LeakCheck(tmp_path)
        yield found
        found.check()


def test_nothing_is_found_where_nothing_is(check: LeakCheck) -> None:
    assert check.leaks() == []


@contextmanager
def child() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        process.communicate(b"\n")


SEGMENT = """
import mmap, os, sys
name = f"psm_{os.getpid()}"
with open(f"/dev/shm/{name}", "w+b") as file:
    file.truncate(64)
    mapped = mmap.mmap(file.fileno(), 64)
print(name, flush=True)
sys.stdin.readline()
os.unlink(f"/dev/shm/{name}")
"""
"""A program with a segment of shared memory, named as Python names them."""

SEMAPHORE = """
import sys, _multiprocessing
semaphore = _multiprocessing.SemLock(0, 1, 1, f"/mp-{__import__('os').getpid()}", False)
print("made", flush=True)
sys.stdin.readline()
_multiprocessing.sem_unlink(semaphore.name)
"""
"""A program with a semaphore, whose file gets its name only after it was mapped under another one."""


@contextmanager
def child_with_segment() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", SEGMENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()


@contextmanager
def neighbour(program: str) -> Iterator[None]:
    """Run a program that is no descendant of this process, and wait for its first line."""
    start = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", start, program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline()
        process.wait()
        yield
        process.stdin.close()
        assert process.stdout.read() == "", "until it has ended"


def segments(check: LeakCheck) -> list[str]:
    return [line for line in check.leaks() if line.startswith("shared memory")]


@contextmanager
def zombie() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        yield
    finally:
        process.wait()


@contextmanager
def listening() -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)):
        yield


@contextmanager
def open_file() -> Iterator[None]:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def temporary() -> Iterator[None]:
    with tempfile.NamedTemporaryFile():
        yield


@contextmanager
def shared() -> Iterator[None]:
    segment = SharedMemory(create=True, size=64)
    try:
        yield
    finally:
        segment.close()
        segment.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="names what Linux knows")
@pytest.mark.parametrize(
    ("leak", "said"),
    [
        (child, "child process"),
        (zombie, "child process"),
        (listening, "listening socket 127.0.0.1:"),
        (open_file, "file descriptor"),
        (temporary, "temporary file"),
        (shared, "shared memory psm_"),
    ],
)
def test_what_is_left_is_named(check: LeakCheck, leak: object, said: str) -> None:
    with ExitStack() as held:
        held.enter_context(leak())  # type: ignore[operator]
        with pytest.raises(AssertionError, match="left behind: ") as caught:
            check.check(seconds=0.05)
    assert said in str(caught.value)


def test_garbage_in_a_cycle_is_not_left(check: LeakCheck) -> None:
    cycle = [socket.create_server(("127.0.0.1", 0))]
    cycle.append(cycle)  # type: ignore[arg-type]
    assert len(check.leaks()) == 2, "a listening socket and its descriptor"
    del cycle
    with pytest.warns(ResourceWarning):
        check.check()


@pytest.mark.skipif(sys.platform != "linux", reason="names what Linux knows")
def test_a_descriptor_in_the_place_of_another_is_found() -> None:
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as other:
        check = LeakCheck()
        os.dup2(other.fileno(), file.fileno())
        assert len(check.leaks()) == 1


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="has no folder of shared memory")
@pytest.mark.parametrize("program", [SEGMENT, SEMAPHORE], ids=["segment", "semaphore"])
def test_other_programs_files_and_segments_are_their_own(check: LeakCheck, program: str) -> None:
    """A file that has nothing to do with segments, and a segment that another process has mapped."""
    foreign = SHARED_MEMORY / f"foreign-{os.getpid()}"
    foreign.write_bytes(b"x")
    try:
        with neighbour(program):
            assert segments(check) == []
    finally:
        foreign.unlink()


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="has no folder of shared memory")
def test_what_a_killed_process_leaves_is_found(check: LeakCheck) -> None:
    with child_with_segment() as (process, name):
        process.kill()
        process.wait()
        assert segments(check) == [f"shared memory {name}"]
        (SHARED_MEMORY / name).unlink()


def test_temporary_files_go_to_the_folder_and_then_where_they_went(tmp_path: Path) -> None:
    before = tempfile.gettempdir(), os.environ.get("TMPDIR")
    with temporary_folder(tmp_path):
        assert tempfile.gettempdir() == str(tmp_path)
        command = [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]
        assert subprocess.check_output(command, text=True).strip() == str(tmp_path)
    assert (tempfile.gettempdir(), os.environ.get("TMPDIR")) == before


def test_without_psutil_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(RuntimeError, match=r"needs psutil: pip install psutil"):
        import_psutil()
