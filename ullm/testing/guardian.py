"""A server under test ends with the test's process, even if that is killed and can stop nothing any more."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

_CODE = (
    "import os, signal, sys\n"
    "if not sys.stdin.buffer.read():\n"
    "    try: os.kill(int(sys.argv[1]), getattr(signal, 'SIGKILL', signal.SIGTERM))\n"
    "    except OSError: pass\n"
)


class Guardian:
    """A small process that waits for the end of this one, and then kills a server; its workers end with it.

    Args:
        pid: of the server.
    """

    def __init__(self, pid: int) -> None:
        # In a session of its own: Ctrl-C must not end it before its time.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE, str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """End it: the server has ended. May be called again."""
        assert self._process.stdin is not None, "it is a pipe"
        if self._process.stdin.closed:
            return
        with suppress(OSError):  # somebody has killed it
            self._process.stdin.write(b".")
            self._process.stdin.close()
        self._process.wait()
