"""The faults that a worker carries out itself, each as close as possible to the real event.

A process crashes, hangs or is suspended as a whole. A thread cannot do that to itself alone, so it does the
nearest thing; see docs/how-to/fault-injection.md.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from ullm.errors import FaultInjected, OutOfMemory
from ullm.protocol.messages import Inject

EXIT_STATUS = 3
"""Exit status of the action ``exit``."""

A_LONG_TIME = 1e9
"""Seconds; stands for an unlimited time."""

Misbehave = Callable[[Inject, bool], None]
"""Carries out an `Inject`; the second argument tells whether the model is loaded."""


class Crashed(BaseException):
    """Raised in a worker that cannot kill itself: it ends at once, without further messages.

    Args:
        cause: description of the end, as a transport gives it for a process.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def as_process(inject: Inject, loaded: bool) -> None:
    """Carry out a fault in a worker process."""
    match inject.action:
        case "crash":
            kill_this_process()
        case "stop" if sys.platform != "win32":  # where plans with it are refused
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os.write(2, b"injected fault: exit\n")
            os._exit(EXIT_STATUS)
        case "hang":
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # like a kernel that never returns
            time.sleep(inject.seconds or A_LONG_TIME)
        case _:
            anywhere(inject, loaded)


def as_thread(inject: Inject, loaded: bool) -> None:
    """Carry out a fault in a worker thread."""
    match inject.action:
        case "crash" | "exit":
            raise Crashed(ending(inject.action))
        case "hang":
            time.sleep(inject.seconds or A_LONG_TIME)
        case _:
            anywhere(inject, loaded)


def anywhere(inject: Inject, loaded: bool) -> None:
    """Carry out a fault that is the same in all workers.

    Raises:
        FaultInjected: for ``raise``, and for actions that this kind of worker cannot carry out.
        OutOfMemory: for ``oom`` before the model is loaded, as loading would.
        MemoryError: for ``oom`` later on; with torch its own error.
    """
    match inject.action:
        case "slow":
            time.sleep(inject.seconds)
        case "oom" if not loaded:
            raise OutOfMemory("injected fault: out of memory while loading")
        case "oom":
            torch = sys.modules.get("torch")
            raise getattr(torch, "OutOfMemoryError", MemoryError)("injected fault: out of memory")
        case _:
            raise FaultInjected(inject.action)


def ending(action: str) -> str:
    """Return the description of a simulated end."""
    return "was killed by SIGKILL" if action == "crash" else f"exited with status {EXIT_STATUS}"


def kill_this_process() -> NoReturn:
    """Kill this process by SIGKILL or TerminateProcess: nothing is flushed, no handler runs."""
    if sys.platform == "win32":
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nothing survives that")
