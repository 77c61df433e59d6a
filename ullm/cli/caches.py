"""``ullm list | show | rm``: what the caches hold, with sizes, and how to be rid of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from ullm.errors import UsageError
from ullm.hub.caches import Entry, entries, remove, select


def list_caches(*, as_json: bool) -> int:
    """Print every entry of all caches, and the sum; return 0."""
    known = _known()
    if as_json:
        shown = [{"name": e.name, "bytes": e.bytes, "path": e.path, "modified": e.modified} for e in known]
        return _print_json({"entries": shown, "bytes": sum(entry.bytes for entry in known)})
    for entry in known:
        day = time.strftime("%Y-%m-%d", time.localtime(entry.modified))
        sys.stdout.write(f"{size_text(entry.bytes):>12}  {day}  {entry.name}\n")
    sys.stdout.write(f"{size_text(sum(entry.bytes for entry in known)):>12}  in {len(known)} entries\n")
    return 0


def show(name: str, *, as_json: bool) -> int:
    """Print one entry with its files, or all of a kind; return 0.

    Raises:
        ModelNotFound: there is no such entry.
    """
    chosen = select(_known(), [name])
    if as_json:
        return _print_json({"entries": [msgspec.structs.asdict(entry) for entry in chosen]})
    for entry in chosen:
        changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.modified))
        sys.stdout.write(f"{entry.name}\n  path      {entry.path}\n  size      {size_text(entry.bytes)}\n")
        sys.stdout.write(f"  modified  {changed}\n")
        for revision in entry.revisions:
            sys.stdout.write(f"  revision  {revision}\n")
        for file, size in sorted(entry.files.items()):
            sys.stdout.write(f"  {size_text(size):>12}  {file}\n")
    return 0


def rm(names: Sequence[str], *, yes: bool) -> int:
    """Remove entries once the user agrees; return 1 if not all of them are removed.

    Raises:
        ModelNotFound: there is no such entry; nothing is removed.
        UsageError: nothing is named, or nobody can be asked.
    """
    if not names:
        raise UsageError("rm needs what to remove, as in ullm rm kernels; ullm list shows what there is")
    chosen = select(_known(), names)
    if not yes and not _agreed(chosen):
        sys.stderr.write("nothing was removed\n")
        return 1
    status = 0
    for entry in chosen:
        try:
            remove(entry)
        except OSError as error:
            sys.stderr.write(f"error: {entry.name}: {error.strerror or error}\n")
            status = 1
        else:
            sys.stdout.write(f"removed {entry.name}, {size_text(entry.bytes)}\n")
    return status


def size_text(count: int) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"


def _known() -> list[Entry]:
    known, damaged = entries()
    for line in damaged:
        sys.stderr.write(f"warning: {line}\n")
    return known


def _agreed(chosen: Sequence[Entry]) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("stdin is no terminal, so nobody can be asked; say --yes to remove without asking")
    for entry in chosen:
        sys.stderr.write(f"{size_text(entry.bytes):>12}  {entry.path}\n")
    total = size_text(sum(entry.bytes for entry in chosen))
    sys.stderr.write(f"remove {'this' if len(chosen) == 1 else f'these {len(chosen)}'}, {total}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _print_json(value: Any) -> int:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
    return 0
