"""The compiled kernels in the cache: a folder that nobody else writes to, and files checked before use.

A library runs with all rights of the process that loads it, and one that was cut ends it by SIGBUS. So size
and digest are recorded beside it, and folder, owner and mode are checked before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from pathlib import Path

FOLDER_MODE = 0o700
FILE_MODE = 0o600
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def open_folder(folder: Path) -> None:
    """Make the folder of the compiled kernels, for this user alone.

    Raises:
        PermissionError: it belongs to another user, or others may write to it.
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    if sys.platform == "win32":
        return
    status = folder.lstat()
    if status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode):
        if stat.S_IMODE(status.st_mode) != FOLDER_MODE:
            folder.chmod(FOLDER_MODE)
        return
    if not _is_trusted(status) or not stat.S_ISDIR(status.st_mode):
        raise PermissionError(0, "the folder is another user's, who could put anything into it")


def is_intact(path: Path) -> bool:
    """Return whether a file has the size and the digest on record, and nobody else can have written it.

    Raises:
        OSError: it cannot be read, though it exists.
    """
    record = _record(path)
    try:
        if not (_is_trusted(path.lstat()) and _is_trusted(record.lstat())):
            return False
        expected = json.loads(record.read_bytes())
        return bool(expected == _describe(path))
    except (FileNotFoundError, ValueError):
        return False


def keep(built: Path, path: Path) -> None:
    """Give a file its final name, with its record, so that a crash at any moment leaves both or neither.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    built.chmod(FOLDER_MODE)
    record = _record(path)
    partial = built.with_name(f"{built.name}.record")
    text = json.dumps(_describe(built))
    record.unlink(missing_ok=True)  # else it would be that of another file for a moment
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE), "w") as file:
        file.write(text)
    for each, to in ((built, path), (partial, record)):
        _sync(each)
        each.replace(to)
    if os.name == "posix":
        _sync(path.parent)


def _describe(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _is_trusted(status: os.stat_result) -> bool:
    """Return whether only this user or root can have written it."""
    if sys.platform == "win32":
        return True
    links = not stat.S_ISLNK(status.st_mode)
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & _OTHERS_WRITE and links


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
