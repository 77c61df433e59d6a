"""Modules of the standard library that only POSIX systems have; no other file of ullm imports them.

Whoever takes one from here does so where the system is known not to be Windows.
"""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import fcntl as fcntl
    import resource as resource
    import termios as termios
