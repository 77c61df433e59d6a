"""What ullm keeps on this machine and where: its own cache, and models in the Hugging Face hub's.

Entries are called ``<folder of ullm's cache>/<name>``, as in ``models/SmolLM2-135M-Instruct``, or
``hub/<owner>/<name>``. The hub's cache is read and changed by huggingface_hub, whose layout it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ullm.errors import ModelNotFound, UsageError
from ullm.hub.files import cache_dir

HUB = "hub"
_COMPANIONS = ("-wal", "-shm", "-journal")
"""Ends of the names of files that SQLite keeps beside a database."""


class Entry(msgspec.Struct, frozen=True):
    """One thing that can be removed by itself.

    Args:
        name: as in ``kernels/1f0c.so``; unique.
        path: the file or folder.
        bytes: the size of its files; links count nothing.
        modified: time of its last change, in seconds since 1970.
        files: relative name → bytes.
        revisions: commits of a model in the hub's cache.
    """

    name: str
    path: str
    bytes: int
    modified: float
    files: dict[str, int]
    revisions: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The part of the name before the first slash."""
        return self.name.partition("/")[0]


def entries() -> tuple[list[Entry], list[str]]:
    """Return what all caches hold, by name, and a line for each damaged model in the hub's cache."""
    in_hub, damaged = _hub_entries()
    return sorted([*_own_entries(cache_dir()), *in_hub], key=lambda entry: entry.name), damaged


def select(known: Iterable[Entry], names: Iterable[str]) -> list[Entry]:
    """Return the entries of these names: whole ones, ones without the kind if only one fits, or whole kinds.

    Raises:
        ModelNotFound: there is no such entry.
        UsageError: several have the name; names them.
    """
    chosen: dict[str, Entry] = {}
    known = list(known)
    for name in names:
        wanted = name.rstrip("/")
        found = [entry for entry in known if wanted in (entry.name, entry.kind)]
        if not found:
            found = [entry for entry in known if wanted and entry.name.endswith(f"/{wanted}")]
            if len(found) > 1:
                raise UsageError(
                    f"{name} may be any of {', '.join(e.name for e in found)}; give one of these"
                )
        if not found:
            raise ModelNotFound(f"{name} is in no cache; ullm list shows what is")
        chosen |= {entry.name: entry for entry in found}
    return list(chosen.values())


def remove(entry: Entry) -> None:
    """Remove an entry from the disk.

    Raises:
        OSError: it cannot be removed, or only in part.
    """
    path = Path(entry.path)
    if entry.kind == HUB and entry.revisions:
        from huggingface_hub import scan_cache_dir

        scan_cache_dir(path.parent).delete_revisions(*entry.revisions).execute()
        if path.exists():  # the library only logs what it cannot remove
            raise OSError(None, "not all of it could be removed", str(path))
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        for companion in _companions(path):
            companion.unlink(missing_ok=True)
        path.unlink()


def _own_entries(root: Path) -> Iterator[Entry]:
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and not folder.is_symlink():
            yield from (_entry(folder, path) for path in sorted(folder.iterdir()) if _counts(path))


def _counts(path: Path) -> bool:
    """Return whether a path is an entry, and neither a lock nor part of a database."""
    base = next((path.name.removesuffix(end) for end in _COMPANIONS if path.name.endswith(end)), None)
    return path.suffix != ".lock" and (base is None or not path.with_name(base).exists())


def _entry(folder: Path, path: Path) -> Entry:
    if path.is_dir() and not path.is_symlink():
        files = [Path(at, name) for at, _, names in os.walk(path) for name in names]
        sizes = {
            file.relative_to(path).as_posix(): file.lstat().st_size for file in files if not file.is_symlink()
        }
    else:
        files = [each for each in (path, *_companions(path)) if os.path.lexists(each)]
        sizes = {file.name: file.lstat().st_size for file in files if not file.is_symlink()}
    modified = max((file.lstat().st_mtime for file in files), default=path.lstat().st_mtime)
    return Entry(f"{folder.name}/{path.name}", str(path), sum(sizes.values()), modified, sizes)


def _companions(path: Path) -> list[Path]:
    return [path.with_name(path.name + end) for end in _COMPANIONS]


def _hub_entries() -> tuple[list[Entry], list[str]]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        info = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return [], []
    models = [_hub_entry(repo) for repo in info.repos if repo.repo_type == "model"]
    return models, [" ".join(str(warning).split()) for warning in info.warnings]


def _hub_entry(repo: Any) -> Entry:
    revisions = tuple(sorted(revision.commit_hash for revision in repo.revisions))
    files = {file.file_name: file.size_on_disk for revision in repo.revisions for file in revision.files}
    return Entry(
        f"{HUB}/{repo.repo_id}", str(repo.repo_path), repo.size_on_disk, repo.last_modified, files, revisions
    )
