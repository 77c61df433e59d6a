"""Starting a worker process: its command line and its environment."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from ullm.actors.transports.base import WorkerSpec
from ullm.hub.guarded import working_folder
from ullm.logs import get_logger
from ullm.supervision import exponential_backoff
from ullm.system.interpreter import python_command, python_environment
from ullm.system.lifeline import Lifeline

FIRST_DELAY, LAST_DELAY = 0.1, 2.0
"""Seconds between two attempts to start a process: doubled each time, up to the limit."""
PERSIST_SECONDS = 60.0
"""Seconds of such attempts, after which it counts as a failed start."""
SHORT = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
"""Errors of a system that may have room for a process a moment later."""

log = get_logger(__name__)


async def spawn(spec: WorkerSpec, lifeline: Lifeline) -> trio.Process:
    """Start the process, and tie it to its lifeline.

    Where the system has no room for a process just now, as at a limit of processes, wait and try again.

    Raises:
        OSError: it cannot be started.
    """
    command = python_command("-X", "faulthandler", "-m", "ullm.worker.main")
    command += ["--name", spec.rank.name, "--runner", spec.runner]
    command += ["--standby"] if spec.standby else []
    options: dict[str, Any] = {}
    if os.name == "posix":
        options["start_new_session"] = True
    else:
        options["creationflags"] = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    for descriptor in lifeline.pass_fds:
        command += ["--lifeline", str(descriptor)]
        options["pass_fds"] = [descriptor]
    pipe = subprocess.PIPE
    options |= {"stdin": pipe, "stdout": pipe, "stderr": pipe}
    options |= {"cwd": working_folder(), "env": _environment(spec)}
    process = await _persistently(partial(trio.lowlevel.open_process, command, **options), spec.rank.name)
    lifeline.started(process)
    return process


async def _persistently(start: Callable[[], Awaitable[trio.Process]], name: str) -> trio.Process:
    """Return what ``start`` returns, trying again while resources are short, for `PERSIST_SECONDS`."""
    delay = exponential_backoff(FIRST_DELAY, LAST_DELAY)
    give_up_at = trio.current_time() + PERSIST_SECONDS
    for attempt in itertools.count(1):
        try:
            return await start()
        except (OSError, RuntimeError) as error:  # RuntimeError: trio cannot start a thread for it
            short = error.errno in SHORT if isinstance(error, OSError) else "thread" in str(error)
            if not short or trio.current_time() >= give_up_at:
                raise error if isinstance(error, OSError) else OSError(errno.EAGAIN, str(error)) from error
            log.warning("no process can be started now, trying again", worker=name, cause=str(error))
        await trio.sleep(delay(attempt))
    raise AssertionError("counting has no end")


def _environment(spec: WorkerSpec) -> dict[str, str]:
    """Return this process's environment without keys, with its module path and what libraries read."""
    environment = python_environment()
    if spec.cpu_threads is not None:
        for library in ("OMP", "MKL", "OPENBLAS"):
            environment[f"{library}_NUM_THREADS"] = str(spec.cpu_threads)
    if spec.interface:
        for library in ("GLOO", "NCCL"):
            environment.setdefault(f"{library}_SOCKET_IFNAME", spec.interface)
    return environment
