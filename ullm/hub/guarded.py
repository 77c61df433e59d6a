"""Child processes that end with this one, whatever ends it: compilers, conversions, downloads.

A process between the two, the guard, starts the program in a process group of its own. Its stdin is a pipe
whose other end this process holds, so it notices the end of this process, SIGKILL included: then it removes
what the program leaves unfinished, and kills the group, the program's own children with it. A guard that is
suspended is continued by the kernel then.

Also run as a script, by path, so that the guard imports nothing but a few modules of the standard library.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_READ = 4096


def open_guarded(
    command: Sequence[str], scratch: Sequence[Path] = (), **options: Any
) -> subprocess.Popen[Any]:
    """Start a program that does not outlive this process; `end_guarded` ends it.

    Args:
        scratch: files and folders to remove if this process is killed meanwhile.
        options: those of `subprocess.Popen`, except for ``stdin``, which is empty; the environment is by
            default this process's without its keys.
    """
    # Not at the top: the guard itself runs without them.
    from ullm.system.forks import forks
    from ullm.system.interpreter import without_secrets
    from ullm.system.lifeline import CONTINUE, tie

    options = {"env": without_secrets(), **options}
    if os.name != "posix":
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    guard = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(len(scratch)), *map(str, scratch)]
    with forks.held_off():
        theirs, ours = os.pipe()
        forks.close_in_child(ours)
    stdin = open(ours, "wb", buffering=0)
    try:
        process = subprocess.Popen(
            [*guard, *command], stdin=theirs, start_new_session=True, cwd=working_folder(), **options
        )
        tie(theirs, process.pid, CONTINUE)
    except BaseException:
        stdin.close()
        raise
    finally:
        os.close(theirs)
    process.stdin = stdin
    return process


def end_guarded(process: subprocess.Popen[Any]) -> None:
    """Kill the program with all its children, if it still runs, and reap it."""
    if process.poll() is None:
        if sys.platform != "win32":
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def working_folder() -> str | None:
    """Return where to start other programs: None, the working directory, unless that has been removed.

    Libraries such as MKL fail to load, and Python to start, in a folder that no longer exists.
    """
    try:
        os.getcwd()
    except OSError:
        return os.path.abspath(os.sep)
    return None


def main(arguments: Sequence[str]) -> int:
    """Run the program to its end; return its exit status, or 128 + the signal that ended it."""
    if sys.platform == "win32":
        raise OSError("programs are not guarded there")
    count = int(arguments[0])
    scratch, command = arguments[1 : 1 + count], arguments[1 + count :]
    ended, at_end = os.pipe()
    os.set_blocking(at_end, False)
    signal.set_wakeup_fd(at_end)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return 127
    while process.poll() is None:
        ready = select.select([0, ended], [], [])[0]
        if ended in ready:
            os.read(ended, _READ)
        elif not os.read(0, _READ):
            _abandon(scratch)
    status = process.returncode
    return status if status >= 0 else 128 - status


def _abandon(scratch: Sequence[str]) -> None:
    """Kill the group, this process last of all, because it removes what the others still write."""
    if sys.platform == "win32":
        raise OSError("programs are not guarded there")
    me = os.getpid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for path in scratch:
        _remove(path)
    for process in _group(me):
        os.kill(process, signal.SIGKILL)
    for path in scratch:
        _remove(path)
    os.killpg(me, signal.SIGKILL)


def _group(group: int) -> list[int]:
    """Return the processes of a group other than its leader, on Linux; none elsewhere."""
    if sys.platform == "win32":
        raise OSError("programs are not guarded there")
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        try:
            if name.isdigit() and int(name) != group and os.getpgid(int(name)) == group:
                found.append(int(name))
        except OSError:
            continue  # it has ended
    return found


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
