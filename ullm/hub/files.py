"""Folders and files: the cache, and checks that a checkpoint is complete."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported
from ullm.logs import get_logger

Progress = Callable[[str, int, int | None], None]
"""``progress(label, done, total)`` in bytes; an exception that it raises cancels the work."""

HEARTBEAT = 0.25
"""Seconds between calls of a progress function while nothing changes."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, as its own library has it; and of files of JSON, which have less."""
MAX_NAME = 255
"""Bytes of a file's name, on all usual file systems."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PARTIAL = ".partial-"

_READ = (".json", ".jinja", ".safetensors", ".gguf", ".model", ".txt", ".py")
_SPECIAL: Mapping[str, Callable[[int], bool]] = {
    "named pipe": stat.S_ISFIFO,
    "socket": stat.S_ISSOCK,
    "device": stat.S_ISCHR,
    "block device": stat.S_ISBLK,
}


log = get_logger(__name__)


def silent(label: str, done: int, total: int | None) -> None:
    """Show no progress."""


def cache_dir() -> Path:
    """Return ``$ULLM_CACHE``, or else ullm's folder within the platform's folder for caches.

    Where there is no home, or it can neither be written to nor has a cache, a folder of this user's among
    the temporary files.

    Raises:
        ModelNotFound: that folder belongs to another user.
    """
    if root := os.environ.get("ULLM_CACHE"):
        return Path(root).expanduser()
    folder = _platform_folder()
    return folder if folder is not None and _is_usable(folder) else _temporary_folder()


def _platform_folder() -> Path | None:
    """Return ullm's folder within the platform's folder for caches; None if the user has no home."""
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "ullm"
        if sys.platform == "win32":
            return (
                Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "ullm" / "Cache"
            )
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ullm"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return None


def _is_usable(folder: Path) -> bool:
    """Return whether the folder can be read, or can be made."""
    if folder.is_dir():
        return os.access(folder, os.R_OK | os.X_OK)
    parent = next((each for each in folder.parents if each.exists()), folder)
    return parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)


@functools.cache
def _temporary_folder() -> Path:
    user = "user"
    if sys.platform != "win32":
        user = str(os.getuid())
    folder = Path(tempfile.gettempdir(), f"ullm-{user}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if sys.platform != "win32":
            status = folder.lstat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022 or not stat.S_ISDIR(status.st_mode):
                raise PermissionError(errno.EPERM, "others can write to it")
    except OSError as error:
        raise ModelNotFound(
            f"there is no place for the cache: this user has no home to write to, and {folder} cannot be "
            f"used: {error.strerror}; set ULLM_CACHE to a folder that this user can write to"
        ) from None
    log.warning("no home to write to: the cache is among the temporary files", folder=str(folder))
    return folder


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk, or a user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def cannot_keep(error: OSError) -> ModelNotFound:
    """Return the error about a cache that cannot be written to."""
    failure = ModelNotFound(
        f"the model cannot be kept in {cache_dir()}: {error.strerror or error}; make room there and in the "
        "folder for temporary files (TMPDIR), let this user write there, or set ULLM_CACHE to another folder"
    )
    failure.__cause__ = error
    return failure


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        missing_ok: return an empty object if there is no such file.

    Raises:
        ModelNotFound: there is no such file.
        ModelFileBroken: the file is not a JSON object, or beyond reason.
    """
    if kind := special_kind(path):
        raise ModelFileBroken(path, f"{kind} and not a file; put a file there")
    try:
        if (size := path.stat().st_size) > MAX_HEADER:
            raise ModelFileBroken(path, f"has {size} bytes; at most {MAX_HEADER} are read")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise ModelNotFound(f"{path.parent} has no {path.name}; is it a model's folder?") from None
    except OSError as error:
        raise ModelFileBroken(path, f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ModelFileBroken(path, f"not readable as JSON: {error}") from None
    except RecursionError:
        raise ModelFileBroken(path, "not readable as JSON: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ModelFileBroken(path, f"must hold a JSON object, holds a {type(content).__name__}")
    return content


_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("*token*", "*vocab*", "*.model", "*.tiktoken", "merges.txt")


def check_readable(folder: Path) -> None:
    """Check that a model's folder holds plain files only, since reading a named pipe would never end.

    Raises:
        ModelFileBroken: one that ullm might read is something else.
    """
    for path in sorted((*folder.glob("*"), *folder.glob("*/*.jinja"))):
        if path.suffix in _READ and (kind := special_kind(path)):
            raise ModelFileBroken(path, f"{kind} and not a file; put a file there")


def check_model_folder(folder: Path) -> None:
    """Check that a folder holds a model, as far as the names of its files tell.

    Raises:
        ModelNotFound: it holds none; says what it holds instead.
    """
    if (folder / "config.json").exists():
        return
    if not any(folder.iterdir()):
        raise ModelNotFound(f"{folder} is empty; fetch the model into it, or name another folder")
    if (folder / "adapter_config.json").exists():
        raise ModelNotFound(
            f"{folder} holds a LoRA adapter and no model; give its base model as --model, and this folder as "
            f"--lora NAME={folder}"
        )
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        raise ModelNotFound(f"{folder} holds GGUF files; name one of them, as in {folder / files[0]}")
    raise ModelNotFound(f"{folder} has no config.json; name a folder as save_pretrained writes it")


def check_tokenizer_folder(folder: Path) -> None:
    """Check that a folder has a file that may be a tokenizer's, in whatever format.

    Raises:
        ModelNotFound: it has none.
    """
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise ModelNotFound(
            f"{folder} has no tokenizer; fetch its tokenizer.json, too, or name another one by --tokenizer"
        )


def special_kind(path: Path) -> str:
    """Return "is a named pipe" or the like if reading ``path`` might never end; otherwise an empty string."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return ""  # the attempt to read it says why it cannot be read
    return next((f"is a {name}" for name, test in _SPECIAL.items() if test(mode)), "")


_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)


def gguf_part_names(name: str) -> list[str]:
    """Return the names of a GGUF model's files: one, or all parts of a split one whose first is named.

    Raises:
        ModelUnsupported: another part than the first is named.
    """
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    if int(match[2]) != 1:
        raise ModelUnsupported(f"{name}: this is part {int(match[2])} of a model; name part 00001")
    rest = range(2, int(match[3]) + 1)
    return [name, *(f"{match[1]}-{number:05}-of-{match[3]}{match[4]}" for number in rest)]


def is_later_part(name: str) -> bool:
    """Return whether a file is a part of a split GGUF model, and not the first one."""
    match = _PART.fullmatch(name)
    return match is not None and int(match[2]) != 1


def shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: those that its index names, or else all.

    Raises:
        ModelFileBroken: the index names a file that is missing, or is itself unreadable.
        ModelUnsupported: there is no safetensors file.
    """
    index = folder / INDEX
    if uses_index(folder):
        paths = [folder / name for name in sorted(set(read_index(index).values()))]
    else:
        single = folder / SINGLE
        paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if missing := [path for path in paths if not path.is_file()]:
        raise ModelFileBroken(missing[0], f"missing, though {index.name} names it; fetch the model again")
    if not paths:
        if pickled := sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern)):
            raise ModelUnsupported(
                f"{folder}: {pickled[0]} may run code and is not read; save the model again as safetensors"
            )
        raise ModelUnsupported(f"{folder} has no .safetensors file; other weight formats are not read")
    return paths


def uses_index(folder: Path) -> bool:
    """Return True if an index says where a checkpoint's tensors are.

    As for transformers, a single file counts before an index that names only others.

    Raises:
        ModelFileBroken: the index has to be read to know, and cannot be.
    """
    if not (folder / INDEX).exists():
        return False
    return not (folder / SINGLE).exists() or SINGLE in read_index(folder / INDEX).values()


def read_index(file: Path) -> dict[str, str]:
    """Return what an index of safetensors files says: tensor → name of the file in the index's folder.

    Raises:
        ModelNotFound: there is no such index.
        ModelFileBroken: it says no such thing, or names a file that is not one of safetensors beside it.
    """
    content = read_json(file)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileBroken(file, "has no 'weight_map'")
    if not isinstance(content.get("metadata", {}), dict):
        raise ModelFileBroken(file, "its 'metadata' must be an object")
    for name in weight_map.values():
        if not _is_file_name(name):
            raise ModelFileBroken(file, f"names {name!r:.60}, which is not in its folder")
        if not name.endswith(".safetensors"):
            raise ModelFileBroken(file, f"names {name!r:.60}, which is no .safetensors file")
    return weight_map


def _is_file_name(name: Any) -> bool:
    """Return True if a value is the name of a file, without a folder, that a system may have."""
    try:
        return (
            isinstance(name, str)
            and "\0" not in name
            and Path(name).name == name
            and len(os.fsencode(name)) <= MAX_NAME
        )
    except UnicodeEncodeError:
        return False


def check_weights(folder: Path) -> None:
    """Check by the header of each shard that the file is complete; reads kilobytes, not the weights.

    Raises:
        ModelFileBroken: a file is truncated; the message names the first tensor that is cut off.
    """
    for path in shards(folder):
        _check_shard(path)


def _check_shard(path: Path) -> None:
    # safetensors: u64 header length, JSON header with each tensor's byte range, then the data.
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ModelFileBroken(
                path, f"truncated: its {size} bytes do not even hold the header; fetch it again"
            )
        if length > MAX_HEADER:
            raise ModelFileBroken(path, f"its header has {length} bytes; at most {MAX_HEADER} are read")
        try:
            header = json.loads(file.read(length))
            ends = sorted((int(v["data_offsets"][1]), k) for k, v in header.items() if k != "__metadata__")
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError):
            raise ModelFileBroken(path, "its header is not that of a safetensors file") from None
    for end, name in ends:
        if 8 + length + end > size:
            raise ModelFileBroken(
                path,
                f"truncated: tensor {name} ends at byte {8 + length + end} of {size}; fetch the file again",
            )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def build_folder(
    target: Path, label: str, progress: Progress, valid: Callable[[Path], bool] = Path.is_dir
) -> Iterator[Path | None]:
    """Build a cache folder once and atomically, even if several processes try at the same time.

    Yield an empty folder beside ``target``, which takes the name of ``target`` when the block ends without
    an exception; or None if ``target`` is already ``valid`` once this process has the lock.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, label, progress):
            yield from _build(target, valid)
    except OSError as error:
        inside = str(error.filename or "").startswith(str(target.parent))
        if is_full(error) or (inside and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)):
            raise cannot_keep(error) from error
        raise


def _build(target: Path, valid: Callable[[Path], bool]) -> Iterator[Path | None]:
    if valid(target):
        yield None
        return
    for stale in target.parent.glob(f"{_PARTIAL}{target.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)  # left by a process that was killed
    partial = target.parent / f"{_PARTIAL}{target.name}-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        _let_others_read(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _let_others_read(folder: Path) -> None:
    """Give files the mode that the umask gave their folder: safetensors' writer makes them its user's alone.

    A cache that root filled while an image was built is read by another user later.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


@contextmanager
def _locked(target: Path, label: str, progress: Progress) -> Iterator[None]:
    lock = filelock.FileLock(target.parent / f".{target.name}.lock")
    while True:
        try:
            lock.acquire(timeout=HEARTBEAT)
            break
        except filelock.Timeout:
            progress(f"{label}: another process is doing it", 0, None)
    try:
        yield
    finally:
        lock.release()
