"""Modules of the standard library that only POSIX systems have; no other file of ullm imports them.

Whoever takes one from here does so where the system is known not to be Windows.
"""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import fcntl as fcntl
    import resource as resource
    import termios as termios


def enable_line_editing() -> None:
    """Have `input` edit lines and remember them, where the interpreter has the library for it."""
    try:
        import readline  # noqa: F401  # importing it is what changes input()
    except ImportError:  # Windows' console does so by itself
        return
