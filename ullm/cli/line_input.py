"""Lines typed at a terminal: edited, remembered from one chat to the next, and pasted as one."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from ullm.cli.interrupts import Interrupted
from ullm.hub import cache_dir
from ullm.logs import get_logger

MAX_HISTORY = 1 << 20
"""Bytes of the history's file above which its older half is dropped."""
PATIENCE = 1.0
"""Seconds for a prompt to restore the terminal once it is closed."""

log = get_logger(__name__)


class TerminalInput:
    """Asks for lines on the terminal, from a thread of the caller's.

    What is pasted is one line, with its line breaks. Ctrl-C empties a line.

    Args:
        history: the file that remembers lines; only its owner can read it.
    """

    def __init__(self, history: Path | None = None) -> None:
        path = cache_dir() / "history" / "chat" if history is None else history
        self._session: PromptSession[str] = PromptSession(history=open_history(path), key_bindings=_keys())
        self._closed = False
        self._idle = threading.Event()
        self._idle.set()

    def read_line(self, prompt: str) -> str:
        """Wait for a line.

        Raises:
            EOFError: Ctrl-D, or the terminal is gone, or `close` was called.
            Interrupted: Ctrl-C, at an empty line.
        """
        if self._closed:
            raise EOFError
        self._idle.clear()
        try:
            return self._session.prompt(prompt, handle_sigint=False)
        except OSError as error:
            raise EOFError from error  # the terminal was closed
        finally:
            self._idle.set()

    def close(self) -> None:
        """Have a thread that waits for a line give up, and the terminal be as it was before."""
        self._closed = True
        app = self._session.app
        if app.loop is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended by itself
                app.loop.call_soon_threadsafe(self._give_up)
        self._idle.wait(PATIENCE)

    def _give_up(self) -> None:
        if self._session.app.is_running and not self._session.app.is_done:
            self._session.app.exit(exception=EOFError())


def open_history(path: Path) -> History:
    """Return the history in a file, which is made for its owner alone; without the file, one of this chat."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            path.chmod(0o600)
            content = file.read()
            if len(content) > MAX_HISTORY:
                file.seek(0)
                file.write(content[content.find(b"\n# ", len(content) - MAX_HISTORY // 2) :])
                file.truncate()
    except OSError as error:
        log.warning("questions are not remembered", path=str(path), cause=error.strerror)
        return InMemoryHistory()
    return _KeptHistory(path)


class _KeptHistory(FileHistory):
    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError as error:  # such as a full disk, which is no reason to end the chat
            log.warning("a question is not remembered", path=str(self.filename), cause=error.strerror)


def _keys() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=Interrupted())

    return bindings
