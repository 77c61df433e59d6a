"""Asks a process of its own for what needs torch or may crash: a message on stdin, the answer on stdout."""

from __future__ import annotations

import signal
import subprocess

from ullm.errors import ResourceUnavailable
from ullm.system.interpreter import python_command, python_environment
from ullm.system.lifeline import Lifeline


def ask_child(module: str, message: bytes, timeout: float, *, task: str, advice: str = "") -> bytes:
    """Run a module of ullm in a new process; return what it writes to stdout.

    Args:
        timeout: seconds, after which it is killed.
        task: what it does, for errors, as in ``calibration``.
        advice: what to do if it takes too long.

    Raises:
        ResourceUnavailable: it failed; the message is its last line on stderr, or how it ended.
    """
    pipe = subprocess.PIPE
    with (
        Lifeline() as lifeline,
        subprocess.Popen(
            python_command("-m", module),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=python_environment(),
            pass_fds=lifeline.pass_fds,
        ) as process,
    ):
        lifeline.started(process)
        try:
            output, errors = process.communicate(message, timeout)
        except BaseException as error:
            process.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            late = f"{task} took more than {timeout:g} s{advice and f'; {advice}'}"
            raise ResourceUnavailable(late) from None
    status = process.returncode
    if status:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise ResourceUnavailable(
            f"{task} was ended by {signal.Signals(-status).name}"
            if status < 0
            else lines[-1]
            if lines
            else f"{task} ended with status {status}"
        )
    return output
