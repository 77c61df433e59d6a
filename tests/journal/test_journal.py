"""The journal's file: what it keeps, and what becomes of it when it is damaged, full, or in use."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from ullm.errors import ConfigError
from ullm.journal.journal import Journal, JournalFull, NewTokens, SavedAnswer

LATER = time.time() + 1000
SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "answers.sqlite"


def test_what_was_written_is_there_after_a_new_start(path: Path) -> None:
    journal = Journal(path, SIZE)
    journal.write(begun=[SavedAnswer("a", "me", LATER, b"head"), SavedAnswer("b", "", LATER, b"")])
    journal.write(tokens=[NewTokens("a", 0, [5, 6], ["x", {"y": 1}]), NewTokens("b", 0, [1])])
    journal.write(tokens=[NewTokens("a", 2, [7], ["z"])], ended=[("b", b"end")])
    journal.close()
    notes = [msgspec.Raw(msgspec.msgpack.encode(note)) for note in ("x", {"y": 1}, "z")]
    for ended in ([], [("a", b"end")]):  # once in several rows, once in one
        journal = Journal(path, SIZE)
        assert journal.load() == [
            SavedAnswer("a", "me", LATER, b"head", [5, 6, 7], notes),
            SavedAnswer("b", "", LATER, b"", [1], [], b"end"),
        ]
        journal.write(ended=ended)
        journal.close()
    assert Journal(path, SIZE).load()[0] == SavedAnswer("a", "me", LATER, b"head", [5, 6, 7], notes, b"end")


def test_tokens_of_an_answer_that_has_ended_take_little_room(path: Path) -> None:
    journal = Journal(path, SIZE)
    for number in range(100):
        name = f"chatcmpl-{number:032x}"
        journal.write(begun=[SavedAnswer(name, "", LATER, b"head")])
        for place in range(200):
            journal.write(tokens=[NewTokens(name, place, [place])])
        journal.write(ended=[(name, b"end")])
    found = journal.load()
    assert len(found) == 100
    assert all(answer.token_ids == list(range(200)) for answer in found)
    assert path.stat().st_size < SIZE, "twenty thousand rows would not have had room"


def test_its_user_alone_can_read_it(path: Path) -> None:
    Journal(path, SIZE).write(begun=[SavedAnswer("a", "", LATER, b"secret")])
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


def test_a_kill_loses_nothing_that_was_committed(path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from ullm.journal.journal import *\n"
        f"journal = Journal(Path({str(path)!r}), {SIZE})\n"
        f"journal.write(begun=[SavedAnswer('a', '', {LATER}, b'head')], tokens=[NewTokens('a', 0, [1, 2])])\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert Journal(path, SIZE).load() == [SavedAnswer("a", "", LATER, b"head", [1, 2])]


def test_expired_and_removed_answers_are_gone_with_their_tokens(path: Path) -> None:
    journal = Journal(path, SIZE)
    journal.write(
        begun=[SavedAnswer(name, "", when, b"") for name, when in (("old", 1), ("a", LATER), ("b", LATER))],
        tokens=[NewTokens("old", 0, [1]), NewTokens("a", 0, [2]), NewTokens("b", 0, [3])],
    )
    journal.write(removed=["a"])
    assert [answer.id for answer in journal.load()] == ["b"]
    journal.write(begun=[SavedAnswer("old", "", LATER, b"")])
    assert journal.load()[1].token_ids == [], "not those of the former answer of this name"


def test_tokens_after_a_gap_are_not_used(path: Path) -> None:
    journal = Journal(path, SIZE)
    journal.write(
        begun=[SavedAnswer("a", "", LATER, b"")], tokens=[NewTokens("a", 0, [1]), NewTokens("a", 5, [9])]
    )
    assert journal.load()[0].token_ids == [1]


def test_a_full_journal_says_so_and_goes_on_once_there_is_room(path: Path) -> None:
    journal = Journal(path, SIZE)
    journal.write(begun=[SavedAnswer("a", "", LATER, b""), SavedAnswer("b", "", LATER, b"")])
    with pytest.raises(JournalFull, match="full"):
        journal.write(tokens=[NewTokens("a", first, range(1000)) for first in range(0, 10**6, 1000)])
    journal.write(tokens=[NewTokens("a", 0, range(1000))])
    assert len(journal.load()) == 2, "what was written before is still there"
    journal.write(removed=["a"])
    journal.write(tokens=[NewTokens("b", 0, [1])])
    assert journal.load() == [SavedAnswer("b", "", LATER, b"", [1])]


@pytest.mark.parametrize("damage", ["no database", "wrong pages", "another version"])
def test_a_damaged_file_is_set_aside(path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(path, SIZE)
    journal.write(begun=[SavedAnswer("a", "", LATER, b"x" * 50_000)])
    if damage == "another version":
        journal._connection.execute("PRAGMA user_version=99")
    journal.close()
    content = bytearray(path.read_bytes())
    if damage == "no database":
        path.write_bytes(b"garbage " * 1000)
    elif damage == "wrong pages":
        content[4096:40_000] = b"\xff" * (40_000 - 4096)
        path.write_bytes(content)
    journal = Journal(path, SIZE)
    assert journal.load() == []
    journal.write(begun=[SavedAnswer("b", "", LATER, b"")])
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.stat().st_size > 1000


def test_two_processes_do_not_share_one(path: Path) -> None:
    journal = Journal(path, SIZE)
    with pytest.raises(ConfigError, match="locked"):
        Journal(path, SIZE)
    journal.close()
    Journal(path, SIZE).close()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--journal"):
        Journal(tmp_path / "file" / "answers.sqlite", SIZE)
