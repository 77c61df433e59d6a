"""Handlers for signals that come while the program still imports its modules and has started nothing.

The imports take half a second. Python's own handlers would end the process in silence or with a traceback
in the middle of an import, and a hangup would end a server. This module imports only what is cheap.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from types import FrameType

from ullm.cli.init_process import run_below_init
from ullm.protocol.exit_codes import EXIT_SIGNAL_BASE

_STOPS = ("SIGTERM", "SIGINT", "SIGBREAK")
_STDERR = 2
_OWN = ("ULLM_", "HF_", "HUGGINGFACE_", "XDG_CACHE_HOME")

Handler = Callable[[int, FrameType | None], object]


def answer_signals(arguments: Sequence[str]) -> None:
    """Handle early signals as the command will handle them once it runs.

    A server ends in order, with status 0, and ignores a hangup: it is about to load its model. Any other
    command ends with 128 + the signal's number. A signal that is ignored, as under ``nohup``, stays ignored.
    """
    serves = list(arguments[:1]) == ["serve"]
    _handle(_STOPS, _stop_server if serves else _stop_command)
    if serves:
        _handle(("SIGHUP",), _nothing)


def fill_closed_descriptors() -> None:
    """Open the null device in place of descriptors 0, 1 and 2 that are closed; give errors a stream.

    Otherwise sockets and pipes would get their numbers, and in a child its own output would replace those.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


@contextmanager
def python_handlers_after() -> Iterator[None]:
    """Restore Python's own handlers afterwards, for commands that install none."""
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
    os._exit(0)  # an exception in the middle of an import might surface anywhere, or nowhere


def _stop_command(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_SIGNAL_BASE + number)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Ignore the signal. Unlike SIG_IGN, a handler is not inherited by other programs."""


def unset_empty_variables(environ: MutableMapping[str, str]) -> None:
    """Remove variables with an empty value, so that they count as unset for libraries and workers, too.

    ``HF_HOME=`` would put the Hugging Face cache into the working directory.
    """
    for name in [each for each, value in environ.items() if not value and each.startswith(_OWN)]:
        del environ[name]


def main() -> int:
    """Run the command line, with early signals handled; return the exit status."""
    fill_closed_descriptors()
    unset_empty_variables(os.environ)
    return run_below_init(_run) if sys.argv[1:2] == ["serve"] else _run()


def _run() -> int:
    answer_signals(sys.argv[1:])
    with python_handlers_after():
        from ullm.cli.app import main as run
    return run()
