"""Lifelines: pipes by which the kernel tells child processes that this process has ended, SIGKILL included.

It is the parent that ties a child to its lifeline, right after the start, so that the child need not have run
a single line of its own: it may be suspended, or be another's program. PR_SET_PDEATHSIG could be set only by
the child, or between fork and exec, which is not safe in a process with threads; and it follows the *thread*
that started the process, while trio starts processes from a thread that ends when it has been idle.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import TracebackType
from typing import Protocol

from ullm.system.forks import forks

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
CONTINUE = getattr(signal, "SIGCONT", signal.SIGTERM)


class Started(Protocol):
    """A process that has been started, by `subprocess` or by trio."""

    @property
    def pid(self) -> int:
        """Its process id."""


class Lifeline:
    """The lifeline of one child process, while this context and this process live; on Linux only.

    Elsewhere there is none, and the child has to notice by itself, as by the end of its stdin.

    Args:
        number: the signal that the child gets: SIGKILL, or SIGCONT for one that ends by itself unless it is
            suspended.
    """

    def __init__(self, number: signal.Signals = KILL) -> None:
        self._number = number
        self._theirs: int | None = None
        self._ours: int | None = None
        if sys.platform == "linux":
            with forks.held_off():
                self._theirs, self._ours = os.pipe()
                forks.close_in_child(self._ours)  # a forked child does not prolong the life of this process

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_theirs()
        if self._ours is not None:
            os.close(self._ours)

    @property
    def pass_fds(self) -> list[int]:
        """The ``pass_fds`` of `subprocess.Popen`: what the child inherits; empty where there is none."""
        return [] if self._theirs is None else [self._theirs]

    def started(self, value: Started | None = None) -> None:
        """Tie the child to its lifeline; as in `trio.TaskStatus`, for `trio.run_process`."""
        assert value is not None, "a process that has been started"
        for descriptor in self.pass_fds:
            tie(descriptor, value.pid, self._number)
        self._close_theirs()

    def _close_theirs(self) -> None:
        theirs, self._theirs = self._theirs, None
        if theirs is not None:
            os.close(theirs)


def tie(descriptor: int, pid: int, number: signal.Signals) -> None:
    """Have the kernel send a process a signal when the other end of a pipe closes; on Linux only.

    The process must hold the descriptor, too. A write to the pipe would send the signal as well.
    """
    if sys.platform != "linux":
        return
    import ullm.system.posix

    fcntl = ullm.system.posix.fcntl
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, pid)
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, number)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
