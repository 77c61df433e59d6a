"""What ``ullm list``, ``show`` and ``rm`` see and remove, in caches made for the test."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from ullm.cli.app import main
from ullm.errors import UsageError
from ullm.hub.caches import Entry, entries, select

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache with one thing of each kind, and a hub's cache with one model."""
    own, hub = tmp_path / "own", tmp_path / "hub"
    monkeypatch.setenv("ULLM_CACHE", str(own))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    write(own / "models" / "small" / "model.safetensors", 1000)
    write(own / "models" / "small" / "config.json", 10)
    write(own / "models" / "small.lock", 0)
    for path in ("packed/a.safetensors", "kernels/b.so", "kernels/c.so", "tuning/d.json", "tokenizers/t/x"):
        write(own / path, 100)
    for end in ("", "-wal", "-shm"):
        write(own / "journal" / f"answers-8000.sqlite{end}", 50)
    repo = hub / "models--owner--name"
    write(repo / "blobs" / "f00", 3000)
    write(repo / "refs" / "main", 0).write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(repo / "blobs" / "f00")
    return tmp_path


def write(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def sizes() -> dict[str, int]:
    known, damaged = entries()
    assert not damaged
    return {entry.name: entry.bytes for entry in known}


ALL = {
    "hub/owner/name": 3000,
    "journal/answers-8000.sqlite": 150,
    "kernels/b.so": 100,
    "kernels/c.so": 100,
    "models/small": 1010,
    "packed/a.safetensors": 100,
    "tokenizers/t": 100,
    "tuning/d.json": 100,
}


def test_all_caches_are_listed_with_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes() == ALL
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ALL)
    assert shown.splitlines()[-1].split() == ["4.7", "kB", "in", "8", "entries"]
    assert main(["list", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {entry["name"]: entry["bytes"] for entry in report["entries"]} == ALL
    assert report["bytes"] == sum(ALL.values())


def test_caches_that_are_not_there_are_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ULLM_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert main(["list"]) == 0
    assert capsys.readouterr().out.split() == ["0.0", "kB", "in", "0", "entries"]


def test_a_damaged_model_of_the_hub_is_told(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(cache / "hub" / "models--owner--torn" / "blobs" / "f", 1)
    assert main(["list"]) == 0
    shown = capsys.readouterr()
    assert "hub/owner/name" in shown.out
    assert shown.err.startswith("warning: ")
    assert "torn" in shown.err


@pytest.mark.parametrize("name", ["models/small", "small", "hub/owner/name", "name", "owner/name"])
def test_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert main(["show", name, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert entry["files"]["model.safetensors"] in (1000, 3000)


@pytest.mark.parametrize(
    "name", ["models/small", "hub/owner/name", "journal/answers-8000.sqlite", "kernels/b.so"]
)
def test_one_entry_is_removed_and_no_other(name: str, cache: Path) -> None:
    assert main(["rm", name, "--yes"]) == 0
    assert sizes() == {key: value for key, value in ALL.items() if key != name}
    gone = [path for path in cache.rglob("*") if path.is_file() and path.name.startswith("answers")]
    assert bool(gone) == (name != "journal/answers-8000.sqlite")
    assert (cache / "hub" / "models--owner--name").exists() == (name != "hub/owner/name")


def test_a_kind_is_all_of_it() -> None:
    assert main(["rm", "kernels", "-y"]) == 0
    assert not {"kernels/b.so", "kernels/c.so"} & set(sizes())
    assert len(sizes()) == len(ALL) - 2


def test_an_unknown_name_removes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "kernels", "nope", "--yes"]) == 1
    assert capsys.readouterr().err == "error: nope is in no cache; ullm list shows what is\n"
    assert sizes() == ALL


def test_nobody_is_there_to_agree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["rm", "kernels"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert main(["rm", "--yes"]) == 2
    assert sizes() == ALL


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 1), ("\n", 1), ("", 1)], ids=repr)
def test_the_user_is_asked(answer: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert main(["rm", "kernels/b.so"]) == status
    assert ("kernels/b.so" in sizes()) == bool(status)


def test_what_cannot_be_removed_does_not_keep_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *, missing_ok: bool = False, unlink: object = Path.unlink) -> None:
        if path.name == "b.so":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok=missing_ok)  # type: ignore[operator]

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["rm", "kernels", "--yes"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "error: kernels/b.so: Permission denied\n"
    assert "removed kernels/c.so" in shown.out


def test_a_link_is_removed_and_not_what_it_shows(cache: Path) -> None:
    target = write(cache / "elsewhere" / "weights", 5)
    (cache / "own" / "models" / "linked").symlink_to(target.parent)
    assert main(["rm", "models/linked", "--yes"]) == 0
    assert target.exists()
    assert sizes() == ALL


def test_a_name_that_several_have_is_refused() -> None:
    known = [Entry(name, "", 0, 0.0, {}) for name in ("hub/a/same", "models/same")]
    with pytest.raises(UsageError, match="hub/a/same, models/same"):
        select(known, ["same"])
