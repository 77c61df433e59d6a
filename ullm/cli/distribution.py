"""The other project of this name: the distribution ``ullm`` on the package index.

It has the same import name and the same command as this one, whose distribution is ``ullm-engine``.
"""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution

PLUGIN = "ullm.testing.plugin"
"""Entry point by which this project is known where it was installed under its former name, ``ullm``."""


def other_distribution() -> str | None:
    """Return a line that warns of the other project's distribution if it is installed, else None."""
    try:
        other = distribution("ullm")
    except PackageNotFoundError:
        return None
    return None if _is_this_project(other) else warning(other.version)


def warning(version: str) -> str:
    """Return the line that warns of a version of the other project."""
    return (
        f"ullm {version}, another project with the same import name and command, is installed; "
        "uninstall it (pip uninstall ullm), then install ullm-engine again"
    )


def _is_this_project(other: Distribution) -> bool:
    return any(entry.value == PLUGIN for entry in other.entry_points)
