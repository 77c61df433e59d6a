"""File descriptors: how many there may be, and how many of them connections may have.

A connection is a descriptor. Without a bound of their own, connections that say nothing could take them all,
and a lost worker could not be replaced: its pipes need descriptors, too.
"""

from __future__ import annotations

import sys

ENOUGH = 1 << 16
"""More are not asked for: some programs that workers start look through all that there could be."""
RESERVE = 256
"""For workers and what comes in their place (some six each), files of models, and the process itself."""

if sys.platform == "win32":

    def raise_limit() -> None:
        """Windows has no such limit."""

    def connection_limit() -> int:
        """How many connections there may be at a time."""
        return ENOUGH

else:
    import resource

    def raise_limit() -> None:
        """Ask for as many descriptors as this process may have; the usual 1024 are a soft limit."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # as on macOS, where the kernel has another limit below the hard one
            return

    def connection_limit() -> int:
        """How many connections there may be at a time: the soft limit less a reserve, half of a low one."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = ENOUGH if soft == resource.RLIM_INFINITY else soft
        return soft - min(RESERVE, soft // 2)
