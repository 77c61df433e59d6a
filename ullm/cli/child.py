"""Asks a process of its own for what needs torch or may crash: a message on stdin, the answer on stdout."""

from __future__ import annotations

import signal
import subprocess

from ullm.errors import ResourceUnavailable
from ullm.system.interpreter import python_command, python_environment


def ask_child(module: str, message: bytes, timeout: float, *, task: str, advice: str = "") -> bytes:
    """Run a module of ullm in a new process; return what it writes to stdout.

    Args:
        timeout: seconds, after which it is killed.
        task: what it does, for errors, as in ``calibration``.
        advice: what to do if it takes too long.

    Raises:
        ResourceUnavailable: it failed; the message is its last line on stderr, or how it ended.
    """
    try:
        done = subprocess.run(
            python_command("-m", module),
            input=message,
            capture_output=True,
            timeout=timeout,
            check=False,
            env=python_environment(),
        )
    except subprocess.TimeoutExpired:
        raise ResourceUnavailable(f"{task} took more than {timeout:g} s{advice and f'; {advice}'}") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ResourceUnavailable(
            f"{task} was ended by {signal.Signals(-done.returncode).name}"
            if done.returncode < 0
            else lines[-1]
            if lines
            else f"{task} ended with status {done.returncode}"
        )
    return done.stdout
