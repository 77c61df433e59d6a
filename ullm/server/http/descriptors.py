"""The limit of file descriptors, and the share of it that connections may use.

Each connection uses a descriptor. Without a limit of their own, idle connections could use them all, and a
lost worker could not be replaced: its pipes need descriptors, too.
"""

from __future__ import annotations

import sys

ENOUGH = 1 << 16
"""Descriptors to request at most: some programs that workers start iterate over all possible ones."""
RESERVE = 256
"""Descriptors for workers and their successors (about six each), model files, and the process itself."""

if sys.platform == "win32":

    def raise_limit() -> None:
        """Do nothing: Windows has no such limit."""

    def connection_limit() -> int:
        """Return the maximum number of connections."""
        return ENOUGH

else:
    from ullm.system.posix import resource

    def raise_limit() -> None:
        """Raise the soft limit of descriptors, usually 1024, to what the hard limit allows."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # e.g. macOS, where the kernel has a limit below the hard one
            return

    def connection_limit() -> int:
        """Return the maximum number of connections: the soft limit less `RESERVE`, or half a low limit."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = ENOUGH if soft == resource.RLIM_INFINITY else soft
        return soft - min(RESERVE, soft // 2)
