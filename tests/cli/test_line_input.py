"""Lines typed at a terminal: pastes, Ctrl-C, history; the keys come through a pipe."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from ullm.cli import line_input
from ullm.cli.interrupts import Interrupted
from ullm.cli.line_input import TerminalInput, open_history

PASTED = "\x1b[200~{}\x1b[201~"
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    """What is typed; the terminal's answers go nowhere."""
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        yield typed


def test_a_paste_is_one_line_with_its_line_breaks(keys: PipeInput, tmp_path: Path) -> None:
    terminal = TerminalInput(tmp_path / "history")
    keys.send_text("see: " + PASTED.format("def f():\n    return 1\n") + "ok?\r")
    assert terminal.read_line("› ") == "see: def f():\n    return 1\nok?"


def test_ctrl_c_discards_the_line_and_tells_of_an_empty_one(keys: PipeInput, tmp_path: Path) -> None:
    terminal = TerminalInput(tmp_path / "history")
    keys.send_text(f"half a thought{CTRL_C}hello\r")
    assert terminal.read_line("› ") == "hello"
    keys.send_text(CTRL_C)
    with pytest.raises(Interrupted):
        terminal.read_line("› ")
    keys.send_text("again\r")
    assert terminal.read_line("› ") == "again"
    keys.send_text(CTRL_D)
    with pytest.raises(EOFError):
        terminal.read_line("› ")


def test_lines_are_remembered_over_sessions_for_their_owner_alone(keys: PipeInput, tmp_path: Path) -> None:
    file = tmp_path / "of ullm" / "history"
    first = TerminalInput(file)
    keys.send_text(PASTED.format("two\nlines") + "\r")
    assert first.read_line("› ") == "two\nlines"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    second = TerminalInput(file)
    loaded = list(second._session.history.load_history_strings())
    assert loaded == ["two\nlines"]


def test_a_file_that_others_can_read_is_closed_to_them(tmp_path: Path) -> None:
    file = tmp_path / "history"
    file.touch(0o644)
    open_history(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_older_half_of_a_long_history_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "history"
    history = open_history(file)
    for number in range(100):
        history.store_string(f"question {number}")
    monkeypatch.setattr(line_input, "MAX_HISTORY", file.stat().st_size - 1)
    kept = list(open_history(file).load_history_strings())  # the newest first
    assert 40 < len(kept) < 60
    assert kept == [f"question {number}" for number in range(99, 99 - len(kept), -1)]


def test_a_history_that_cannot_be_kept_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    history = open_history(tmp_path / "file" / "history")
    assert caplog.text.count("questions are not remembered") == 1
    history.store_string("goes on")
    kept = open_history(tmp_path / "history")
    os.remove(tmp_path / "history")
    (tmp_path / "history").mkdir()
    kept.store_string("lost")
    assert "a question is not remembered" in caplog.text


def test_closing_ends_a_wait(keys: PipeInput, tmp_path: Path) -> None:
    terminal = TerminalInput(tmp_path / "history")
    shown, ended = threading.Event(), threading.Event()
    terminal._session.app.before_render += lambda app: shown.set()

    def read() -> None:
        with create_app_session(input=keys, output=DummyOutput()), pytest.raises(EOFError):
            terminal.read_line("› ")
        ended.set()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert shown.wait(10)
    terminal.close()
    assert ended.wait(10)
    thread.join()
    with pytest.raises(EOFError):
        terminal.read_line("› ")
