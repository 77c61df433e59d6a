"""Compiling the kernels where that goes wrong: the model runs all the same, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.model_fixtures import save_tiny
from tests.support.waiting import eventually
from ullm.config import EngineConfig
from ullm.hub.guarded import open_guarded
from ullm.model.architectures import registry
from ullm.model.architectures.decoder import Decoder
from ullm.model.kernels.cpu import build, library_file
from ullm.model.layers.parallel import ParallelContext
from ullm.model.loading.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="compiles on POSIX only")

Compiler = Callable[[str], Path]

SMALL = """
for last; do :; done
echo 'extern "C" int answer() { return 42; }' | c++ -shared -fPIC -x c++ - -o "$last"
"""
"""Body of a compiler that makes a small library, whatever it is asked for; the output's name comes last."""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Have a shell script as ``$CXX``, which notes its calls in a file ``calls``, and an empty cache."""
    if build.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("ULLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "POLL_SECONDS", 0.001)

    def write(body: str) -> Path:
        script = tmp_path / "cxx"
        script.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/calls\n{body}")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return tmp_path / "calls"

    return write


class Stopped(Exception):
    """What ends a worker in the middle."""


def kept(tmp_path: Path) -> list[str]:
    """Return the names of what is in the kernels' folder, without the lock."""
    return sorted(path.name for path in (tmp_path / "cache" / "kernels").iterdir() if path.name != ".lock")


def calls(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    "body",
    [
        "echo \"c++: error: unrecognized command line option '-std=c++20'\" >&2; exit 1",
        "exit 0",
        'for last; do :; done; echo "no library" > "$last"',
        "echo 'No space left on device' >&2; kill -9 $$",
    ],
    ids=["too old", "makes nothing", "makes no library", "killed"],
)
def test_a_compiler_that_fails_costs_one_warning(
    body: str, compiler: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler(body)
    save_tiny(tmp_path / "model", "llama")
    config = EngineConfig(model=str(tmp_path / "model"), device="cpu", dtype="float32")
    device = torch.device("cpu")
    checkpoint = read_checkpoint(tmp_path / "model", config, device)
    model = registry.load_model(checkpoint, config, device, ParallelContext(), lambda: None)
    assert isinstance(model, Decoder)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([line for line in warnings if "without fused kernels" in line]) == 1


def test_a_folder_that_cannot_be_written_costs_one_warning(
    compiler: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler(SMALL)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert build.open_library() is None
    assert len(caplog.records) == 1
    assert "set ULLM_CACHE" in build.why_no_library()


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.with_name(f"{path.name}.json").unlink(),
        lambda path: path.chmod(0o777),
    ],
    ids=["empty", "cut", "zeroed", "no record", "anybody writes"],
)
def test_a_damaged_library_is_compiled_again_and_never_loaded(
    harm: Callable[[Path], None], compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls_file = compiler(SMALL)
    path = build.library_path()
    assert path is not None
    assert build.open_library() is not None
    once = calls(calls_file)
    harm(path)
    assert not library_file.is_intact(path)
    assert build.open_library() is not None
    assert calls(calls_file) == 2 * once
    assert library_file.is_intact(path)
    assert build.open_library() is not None
    assert calls(calls_file) == 2 * once


def test_only_this_user_may_enter_the_folder(compiler: Compiler, tmp_path: Path) -> None:
    compiler(SMALL)
    before = os.umask(0)
    try:
        assert build.open_library() is not None
    finally:
        os.umask(before)
    folder = tmp_path / "cache" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not [path for path in folder.iterdir() if path.name != ".lock" and path.stat().st_mode & 0o022]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files to others")
@pytest.mark.parametrize("planted", ["folder", "library"])
def test_what_another_user_planted_is_never_loaded(planted: str, compiler: Compiler) -> None:
    calls_file = compiler(SMALL)
    assert build.open_library() is not None
    path = build.library_path()
    assert path is not None
    once = calls(calls_file)
    os.chown(path if planted == "library" else path.parent, 12345, 12345)
    library = build.open_library()
    if planted == "folder":
        assert library is None
        assert "another user" in build.why_no_library()
    else:
        assert calls(calls_file) == 2 * once
        assert path.stat().st_uid == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("flags\t: avx2 fma\n", "flags\t: avx2 fma avx_vnni\n"),
        ("Features\t: asimd asimddp\n", "Features\t: asimd asimddp i8mm bf16\n"),
        ("Features\t: asimd\nCPU part\t: 0xd0c\n", "Features\t: asimd\nCPU part\t: 0xd40\n"),
    ],
    ids=["x86", "ARM", "ARM's model"],
)
def test_machines_with_other_processors_share_a_cache_but_no_library(
    one: str, other: str, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(SMALL)
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(build, "CPUINFO", cpuinfo)
    paths = []
    for text in (one, other, one):
        cpuinfo.write_text(text)
        paths.append(build.library_path())
    assert paths[0] == paths[2] != paths[1]


def test_macs_with_other_processors_share_a_cache_but_no_library(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(SMALL)
    monkeypatch.setattr(build, "CPUINFO", tmp_path / "no cpuinfo")
    older, newer = frozenset({"asimddp"}), frozenset({"asimddp", "bf16", "i8mm"})
    paths = []
    for features in (older, newer, older):
        monkeypatch.setattr(build, "arm_features", lambda features=features: features)
        paths.append(build.library_path())
    assert paths[0] == paths[2] != paths[1]


def test_what_is_compiled_is_kept_when_a_start_is_cut_short(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = f'case "$*" in *{build.SOURCES[-1]}*) [ -e {tmp_path}/go ] || exec sleep 100;; esac\n'
    calls_file = compiler(slow + SMALL)

    def impatient() -> None:
        if sum(".o.json" in name for name in kept(tmp_path)) == len(build.SOURCES) - 1:
            raise Stopped  # as if the worker were stopped

    with pytest.raises(Stopped):
        build.require_library(impatient)
    assert not [name for name in kept(tmp_path) if "partial" in name]
    (tmp_path / "go").touch()
    before = calls(calls_file)
    assert build.open_library() is not None
    assert calls(calls_file) == before + 2  # what was missing, and the link
    assert len(kept(tmp_path)) == 2


def test_a_signal_while_a_compiler_is_started_leaves_none(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception of the handler may come when the process is there and nobody knows of it yet."""
    compiler("exec sleep 100")
    started: list[subprocess.Popen[bytes]] = []
    raised = threading.Event()

    def handle(*_: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as a worker does
        raised.set()
        raise Stopped

    def open_and_interrupt(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = open_guarded(*arguments, **options)
        started.append(process)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        raised.wait(10)  # in the main thread, it is raised here
        return process

    monkeypatch.setattr(build, "open_guarded", open_and_interrupt)
    former = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(Stopped):
            build.require_library()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert started
    assert all(process.returncode is not None for process in started)
    assert not [name for name in kept(tmp_path) if "partial" in name]


def test_a_compiler_that_hangs_costs_a_warning(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    calls_file = compiler("exec sleep 100")
    monkeypatch.setattr(build, "COMPILE_SECONDS", 2.0)
    assert "did not end within 2 s" in build.why_no_library()
    pids = calls_file.read_text().split()
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_progress_is_reported_while_this_or_another_process_compiles(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls_file = compiler(SMALL)
    monkeypatch.setattr(build, "HEARTBEAT", 0.001)
    path = build.library_path()
    assert path is not None
    path.parent.mkdir(parents=True)
    other = build.filelock.FileLock(path.parent / ".lock")
    other.acquire()
    waited = 0

    def progress() -> None:
        nonlocal waited
        waited += 1
        if waited == 3:
            assert calls(calls_file) == 0  # one process compiles, others wait
            other.release()

    assert build.open_library(progress) is not None
    assert waited > 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_sigkill_ends_the_compilers_and_removes_what_they_began(compiler: Compiler, tmp_path: Path) -> None:
    calls_file = compiler('for last; do :; done; echo begun > "$last"; sleep 100; exit 1')
    program = textwrap.dedent(
        """
        from ullm.model.kernels.cpu import build
        build.open_library()
        """
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        eventually(lambda: calls(calls_file) > 0 and any("partial" in name for name in kept(tmp_path)))
        process.send_signal(signal.SIGKILL)
    pids = calls_file.read_text().split()
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    eventually(lambda: kept(tmp_path) == [])
