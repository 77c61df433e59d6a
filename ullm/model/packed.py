"""Weights as the CPU's kernels want them, kept in the user's cache and mapped from there.

Reading and packing the weights of a small model takes as long as all the rest of a worker's start, except
importing PyTorch. Mapped from a file they cost nothing until they are used, and all workers on a machine
share them: replicas, a standby worker beside the one that serves, and the next incarnation after a loss.
Measured with SmolLM2-135M: 5 ms instead of 300. Multiplying by mapped weights is as fast.

The file's name says what it was made from, so a file is never wrong, only unused; it appears whole or not
at all, and the oldest ones go when there are too many. Where the cache cannot be written, the weights are
packed in memory at each start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ullm.config import GIB
from ullm.hub import cache_dir
from ullm.logs import get_logger

log = get_logger("ullm.packed")

LEAST_BYTES = 16 << 20
"""Less is packed in no time."""
LIMIT = 8 * GIB
"""Bytes of all files together."""
DISK_SHARE = 4
"""A file takes at most this fraction of what is free on the disk."""
ALIGNMENT = 64
"""Bytes of a vector, and of a line of the processor's cache."""
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""Of the format; kernels may pack into numbers of their own."""
_PARTIAL = ".partial"


@dataclass(frozen=True)
class PackedFile:
    """Where the packed weights of one model on one rank are, or would be."""

    path: Path

    def read(self) -> dict[str, Tensor] | None:
        """Map the weights; None where there is no such file. They must not be written to."""
        try:
            with safe_open(self.path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("packed weights cannot be read", file=str(self.path), reason=str(error))
            return None
        with suppress(OSError):  # a cache that others own: it is as old as they say
            os.utime(self.path)
        return found

    def write(self, weights: dict[str, Tensor]) -> bool:
        """Keep the weights; False, with a line in the log, where that cannot be."""
        size = sum(tensor.nbytes for tensor in weights.values())
        if size < LEAST_BYTES:
            return False
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}{_PARTIAL}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            make_room(self.path.parent, size)
            with partial.open("wb") as file:
                write_safetensors(file, weights)
                os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            log.info("packed weights are not kept", file=str(self.path), reason=str(error))
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            return False
        return True


def packed_file(sources: list[Path], made: object) -> PackedFile:
    """The file for weights made in one way by this version of the code.

    Args:
        sources: the checkpoint's files, known by their path, size, and time of change.
        made: all else that the weights depend on, as JSON can say it.

    Raises:
        OSError: a source cannot be looked at.
    """
    stats = [(path, path.stat()) for path in map(Path.resolve, sources)]
    known = [[str(path), status.st_size, status.st_mtime_ns] for path, status in stats]
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    text = json.dumps([known, made], sort_keys=True, default=str)
    digest = hashlib.sha256(b"\0".join([text.encode(), *code])).hexdigest()[:24]
    return PackedFile(cache_dir() / "packed" / f"{digest}.safetensors")


def make_room(folder: Path, size: int) -> None:
    """Delete what was not used for longest, and what was left unfinished, until ``size`` more is allowed.

    Deleting a file takes nothing from workers that have mapped it.

    Raises:
        OSError: it would be too much of the disk.
    """
    for left in folder.glob(f"*{_PARTIAL}"):
        if not _running(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if size > min(free // DISK_SHARE, LIMIT):
        raise OSError(f"they take {size} bytes, and the disk has {free} free")
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in files)
    for path in files:
        if total + size <= LIMIT:
            break
        total -= path.stat().st_size
        path.unlink(missing_ok=True)


def write_safetensors(file: BinaryIO, weights: dict[str, Tensor]) -> None:
    """As the format wants it (https://github.com/huggingface/safetensors), with aligned tensors.

    The library's own writer aligns to 8 bytes. Tensors whose size is no multiple of the alignment come last.
    """
    order = sorted(weights, key=lambda name: weights[name].nbytes % ALIGNMENT != 0)
    header: dict[str, object] = {}
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
        file.write(weights[name].contiguous().view(torch.uint8).numpy().data)


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
