"""Starting a worker process: its command line, its environment, and its lifeline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from ullm.actors.transports.base import WorkerSpec
from ullm.system.interpreter import python_command, python_environment


@contextmanager
def lifeline() -> Iterator[int | None]:
    """Open a pipe living as long as this process and this context; yield the worker's end. Linux only."""
    if sys.platform != "linux":
        yield None
        return
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(ours)


async def spawn(spec: WorkerSpec, inherited: int | None) -> trio.Process:
    """Start the process, which inherits one descriptor; close that here.

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
    if inherited is not None:
        command += ["--lifeline", str(inherited)]
        options["pass_fds"] = [inherited]
    pipe = subprocess.PIPE
    try:
        return await trio.lowlevel.open_process(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=_environment(spec), **options
        )
    finally:
        if inherited is not None:
            os.close(inherited)


def _environment(spec: WorkerSpec) -> dict[str, str]:
    """Return this process's environment with its module search path and the number of compute threads."""
    environment = python_environment()
    if spec.cpu_threads is not None:
        for library in ("OMP", "MKL", "OPENBLAS"):
            environment[f"{library}_NUM_THREADS"] = str(spec.cpu_threads)
    return environment
