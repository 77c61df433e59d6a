"""Signals that come while the program still imports what it needs, and has started nothing yet.

The imports take half a second, in which Python's own effects would hold: death without a word, a traceback
amid an import, and for a server the end by a hangup. Only what is loaded anyway is imported here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ullm.protocol.exit_codes import EXIT_SIGNAL_BASE

_STOPS = ("SIGTERM", "SIGINT", "SIGBREAK")
_STDERR = 2

Handler = Callable[[int, FrameType | None], object]


def answer_signals(arguments: Sequence[str]) -> None:
    """Have an early signal answered as the command would answer it, if it ran already.

    A server ends in order, with status 0, and takes no notice of a hangup: it is about to load its model.
    Any other command ends with 128 + the signal's number. What is ignored, as under ``nohup``, stays so.
    """
    serves = list(arguments[:1]) == ["serve"]
    _handle(_STOPS, _stop_server if serves else _stop_command)
    if serves:
        _handle(("SIGHUP",), _nothing)


@contextmanager
def python_handlers_after() -> Iterator[None]:
    """Afterwards Python's own handlers hold again, for commands that have none of their own."""
    try:
        yield
    finally:
        for name in _STOPS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is _stop_command:
                signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


def _handle(names: Sequence[str], handler: Handler) -> None:
    for name in names:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _stop_server(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    os.write(_STDERR, f"stopped by {name} before anything was started\n".encode())
    os._exit(0)  # an exception amid an import would come out anywhere, or nowhere


def _stop_command(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_SIGNAL_BASE + number)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Unlike SIG_IGN, this is not inherited by other programs."""


def main() -> int:
    """The command line, with early signals answered; the exit status."""
    answer_signals(sys.argv[1:])
    with python_handlers_after():
        from ullm.cli.app import main as run
    return run()
