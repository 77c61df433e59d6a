"""Weights packed for the CPU's kernels, kept in the user's cache and mapped from there.

Reading and packing the weights of a small model takes as long as all the rest of a worker's start, except
importing PyTorch. Mapped from a file they cost nothing until they are used, and all workers on a machine
share them: replicas, a standby worker beside the serving one, and the next incarnation after a crash.
Measured with SmolLM2-135M: 5 ms instead of 300. Multiplying by mapped weights is as fast.

A file's name is a digest of everything that its content depends on, so a file is never stale, only unused.
Files of other versions of the code are deleted when a new one is written, and the oldest ones when there are
too many. If the cache cannot be written, the weights are packed in memory at each start.

Linux maps a file with huge pages where its cache has it in such parts, and it has if they were written at
once, or if the mapping asks for it before they are read. Then fewer addresses have to be looked up: decoding
one sequence of SmolLM2-135M in four bits takes 3.6 to 4.5 ms per step instead of 4.4 to 5.1 on two cores of
Zen 4 (ext4, Linux 6.18).

A new file is renamed into place once it is written, but not synced to the disk, which would take many times
as long. If the machine loses power before it is, parts may be missing. A sample of every MiB detects that.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ullm.config import GIB
from ullm.hub import cache_dir
from ullm.logs import get_logger

log = get_logger(__name__)

LEAST_BYTES = 16 << 20
"""Fewer bytes are packed so fast that keeping them is not worthwhile."""
LIMIT = 8 * GIB
"""Most bytes of all files together."""
DISK_SHARE = 4
"""A file takes at most one part in this many of the free disk space."""
ALIGNMENT = 64
"""Bytes of a vector and of a cache line."""
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""Names of dtypes in the safetensors format; kernels may pack into dtypes of their own."""
HUGE_PAGE = 2 << 20
"""Bytes of a huge page of x86, and of most ARM systems."""
SAMPLE_EVERY, SAMPLE_BYTES = 1 << 20, 64
"""Distance and length of the samples that show whether a file is whole: filesystems write larger parts."""
MODEL_CODE = Path(__file__).parents[1]
"""Folder of the code that decides what packed weights hold. Weights are packed again when any of it changes;
hashing its 60 files takes 2 ms. The C++ kernels count through the name of their library."""
_PARTIAL = ".partial"


@dataclass(frozen=True)
class PackedFile:
    """The file of the packed weights of one model on one rank, which may not exist."""

    path: Path

    def read(self) -> dict[str, Tensor] | None:
        """Map the weights, which must not be written to; None if there is no such file."""
        try:
            with safe_open(self.path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}
                expected = (file.metadata() or {}).get("sample")
            ask_for_huge_pages(weights.values())
            if sample(weights) != expected:
                raise OSError("the file is incomplete")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("packed weights cannot be read", file=str(self.path), reason=str(error))
            return None
        with suppress(OSError):  # another user owns the cache: its times stay as they are
            os.utime(self.path)
        return weights

    def write(self, weights: dict[str, Tensor], progress: Callable[[], None] = lambda: None) -> bool:
        """Write the weights; return False, and log why, if that is not possible.

        Args:
            progress: called after each tensor.
        """
        size = sum(tensor.nbytes for tensor in weights.values())
        if size < LEAST_BYTES:
            return False
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}{_PARTIAL}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            make_room(self.path, size)
            with partial.open("wb", buffering=0) as file:
                write_safetensors(WholePages(file), weights, progress)
            partial.replace(self.path)
        except OSError as error:
            log.info("packed weights are not kept", file=str(self.path), reason=str(error))
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            return False
        return True


def packed_file(sources: list[Path], made: object) -> PackedFile:
    """Return the file for weights that this version of the code makes in one way.

    Args:
        sources: the checkpoint's files, identified by path, size and time of change.
        made: everything else that the weights depend on; must be serializable as JSON.

    Raises:
        OSError: the status of a source cannot be read.
    """
    stats = [(path, path.stat()) for path in map(Path.resolve, sources)]
    known = [[str(path), status.st_size, status.st_mtime_ns] for path, status in stats]
    code = [path.read_bytes() for path in sorted(MODEL_CODE.rglob("*.py"))]
    text = json.dumps([known, made], sort_keys=True, default=str)
    weights, version = (hashlib.sha256(b).hexdigest()[:24] for b in (text.encode(), b"\0".join(code)))
    return PackedFile(cache_dir() / "packed" / f"{weights}-{version}.safetensors")


def make_room(path: Path, size: int) -> None:
    """Make room for a new file.

    Delete the same weights packed by other versions, unfinished files, and, until ``size`` more bytes are
    allowed, the least recently used files. Workers that have mapped a deleted file keep it.

    Raises:
        OSError: the new file would take too much of the disk.
    """
    folder = path.parent
    for left in folder.glob(f"*{_PARTIAL}"):
        if not _running(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)
    for other in folder.glob(f"{path.name.split('-')[0]}-*.safetensors"):
        other.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if size > min(free // DISK_SHARE, LIMIT):
        raise OSError(f"they take {size} bytes, and the disk has {free} free")
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in files)
    for old in files:
        if total + size <= LIMIT:
            break
        total -= old.stat().st_size
        old.unlink(missing_ok=True)


def sample(weights: dict[str, Tensor]) -> str:
    """Return a digest of a few bytes of each part of the weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        data = _bytes(weights[name])
        for start in (*range(0, len(data), SAMPLE_EVERY), max(0, len(data) - SAMPLE_BYTES)):
            digest.update(data[start : start + SAMPLE_BYTES])
    return digest.hexdigest()


class WholePages:
    """Writes a file in huge pages, whatever the sizes of its parts; `flush` writes the rest."""

    def __init__(self, file: RawIOBase) -> None:
        self._file, self._page, self._used = file, bytearray(HUGE_PAGE), 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        data = memoryview(data)
        while data:
            count = min(len(data), HUGE_PAGE - self._used)
            self._page[self._used : self._used + count] = data[:count]
            self._used, data = self._used + count, data[count:]
            if self._used == HUGE_PAGE:
                self.flush()

    def flush(self) -> None:
        """Write what is left."""
        left = memoryview(self._page)[: self._used]
        while left:
            left = left[self._file.write(left) :]
        self._used = 0


def ask_for_huge_pages(weights: Iterable[Tensor]) -> None:
    """Ask Linux to read mapped weights in huge pages; call it before they are touched.

    Without effect on filesystems that cannot, and on other systems.
    """
    ends = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in weights]
    if not ends or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    first = min(start for start, _ in ends) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    madvise(first, max(end for _, end in ends) - first, mmap.MADV_HUGEPAGE)


def write_safetensors(file: WholePages, weights: dict[str, Tensor], progress: Callable[[], None]) -> None:
    """Write the weights in safetensors' format (https://github.com/huggingface/safetensors), aligned.

    The library's own writer aligns to 8 bytes. Tensors whose size is not a multiple of the alignment come
    last.
    """
    order = sorted(weights, key=lambda name: weights[name].nbytes % ALIGNMENT != 0)
    header: dict[str, object] = {"__metadata__": {"sample": sample(weights)}}
    end = 0
    for name in order:
        tensor, start = weights[name], end
        end += tensor.nbytes
        kind = _NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        file.write(_bytes(weights[name]))
        progress()
    file.flush()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
