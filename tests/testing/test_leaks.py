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

from ullm.testing.leaks import LeakCheck, import_psutil, temporary_folder

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


def test_temporary_files_go_to_the_folder_and_then_where_they_went(tmp_path: Path) -> None:
    before = tempfile.gettempdir(), os.environ.get("TMPDIR")
    with temporary_folder(tmp_path):
        assert tempfile.gettempdir() == str(tmp_path)
        command = [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]
        assert subprocess.check_output(command, text=True).strip() == str(tmp_path)
    assert (tempfile.gettempdir(), os.environ.get("TMPDIR")) == before


def test_without_psutil_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(RuntimeError, match=r"needs psutil: pip install 'ullm\[testing\]'"):
        import_psutil()
