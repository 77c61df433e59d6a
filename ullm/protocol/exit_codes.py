"""Exit codes of ullm's processes, as docs/reference/exit-status.md lists them."""

from __future__ import annotations

from typing import Final

EXIT_OK: Final = 0
EXIT_START_FAILED: Final = 1
"""The command could not be carried out; a line on stderr says why."""
EXIT_USAGE: Final = 2
"""The command line or the environment is wrong."""
EXIT_FAILED: Final = 70
"""The engine failed beyond its restart limits."""
EXIT_ABANDONED: Final = 71
"""Something could not be stopped and was left behind."""
EXIT_SIGNAL_BASE: Final = 128
"""Added to the number of the signal that ended the process, as shells do."""
