"""The release of ullm, for those parts of it that tell other processes which one they are."""

from __future__ import annotations

__version__ = "0.1.0"
