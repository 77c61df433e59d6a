"""Process 1 of a container without an init: reap orphans, so that no zombies pile up.

The kernel gives a process whose parent has ended to process 1. That should wait for it, and may not take the
end of a process from whoever in the same program waits for that one. So the program runs in a child, and
process 1 does nothing but pass on signals and reap, as tini and ``docker run --init`` do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping

from ullm.protocol.exit_codes import EXIT_SIGNAL_BASE

INIT = 1
_OF_THIS_PROCESS = ("LISTEN_PID", "WATCHDOG_PID")
"""Variables that name the process that they are for."""


def run_below_init(run: Callable[[], int]) -> int:
    """Run a program here, or below this process if it is process 1; return the exit status."""
    if sys.platform == "win32" or os.getpid() != INIT:
        return run()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child:
        return _pass_on_and_reap(child)
    with contextlib.suppress(OSError):  # a group of its own, so that a terminal's signals do not come twice
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpgid(0))
    os.environ.update(_renamed(os.environ))
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return run()


def _renamed(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: str(os.getpid()) for name in _OF_THIS_PROCESS if environ.get(name) == str(INIT)}


def _pass_on_and_reap(child: int) -> int:
    """Pass signals on to the child and reap whatever ends, until the child does; return its status.

    When this process ends, the kernel ends all others of the container.
    """
    if sys.platform == "win32":
        raise AssertionError("only POSIX has a process 1")
    with contextlib.suppress(OSError):  # as the child does: whichever comes first
        os.setpgid(child, child)
    while True:
        number = signal.sigwait(signal.valid_signals())
        if number != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        status = _reap(child)
        if status is not None:
            return status if status >= 0 else EXIT_SIGNAL_BASE - status


def _reap(child: int) -> int | None:
    """Reap all that have ended; return the child's exit status, or minus a signal, once it is among them."""
    found = None
    if sys.platform == "win32":
        raise OSError("Windows has no process 1")
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                found = os.waitstatus_to_exitcode(status)
    return found
