"""Exit codes of ullm's processes, as docs/configuration.md lists them."""

from __future__ import annotations

from typing import Final

EXIT_OK: Final = 0
EXIT_START_FAILED: Final = 1
EXIT_FAILED: Final = 70
"""The engine failed beyond its restart limits."""
EXIT_ABANDONED: Final = 71
"""Something could not be stopped and was left behind."""
EXIT_SIGNAL_BASE: Final = 128
"""Added to the number of the signal that ended the process, as shells do."""
