"""KV blocks out of a worker's pool and into it: by memory shared with the engine's process, or by frames."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO

from ullm.protocol.messages import (
    BlocksExported,
    BlocksImported,
    ExportBlocks,
    ImportBlocks,
    ModelInfo,
    SharedMemory,
)
from ullm.protocol.runner import Runner


def export_blocks(runner: Runner, info: ModelInfo, message: ExportBlocks) -> BlocksExported:
    """Carry out a message; no step is pending."""
    number = message.number
    if refusal := _refusal(info, message):
        return BlocksExported(number, error=refusal)
    content = runner.export_blocks(message.block_ids)
    size, checksum = len(content), zlib.crc32(content)
    if message.memory is None:
        return BlocksExported(number, size, checksum, bytes(content))
    try:
        with _opened(message.memory) as file:
            _write(file, content)
    except OSError as error:
        return BlocksExported(number, error=_cannot_use(error), no_memory=True)
    return BlocksExported(number, size, checksum)


def import_blocks(runner: Runner, info: ModelInfo, message: ImportBlocks) -> BlocksImported:
    """Carry out a message; no step is pending. What has another checksum does not get into the pool."""
    number = message.number
    if refusal := _refusal(info, message):
        return BlocksImported(number, refusal)
    if message.memory is None:
        content = bytearray(message.content)
    else:
        try:
            with _opened(message.memory) as file:
                content = _read(file, message.size)
        except OSError as error:
            return BlocksImported(number, _cannot_use(error), no_memory=True)
    if len(content) != message.size or zlib.crc32(content) != message.checksum:
        return BlocksImported(number, "the content of the KV blocks is corrupt")
    runner.import_blocks(message.block_ids, content)
    return BlocksImported(number)


def _refusal(info: ModelInfo, message: ExportBlocks | ImportBlocks) -> str:
    """Return why a message is refused; an empty text if it is not."""
    if not info.kv_identity or message.identity != info.kv_identity:
        return "the KV blocks are of other weights, kernels, or layout"
    if not all(0 <= block < info.num_blocks for block in message.block_ids):
        return f"there are no such KV blocks: the pool has {info.num_blocks}"
    return ""


def _cannot_use(error: OSError) -> str:
    return f"shared memory cannot be used: {error.strerror or error}"


@contextmanager
def _opened(memory: SharedMemory) -> Iterator[FileIO]:
    """Open the memory, if it is what it is said to be: by now another file may be at its path.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    flags = os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    with FileIO(os.open(memory.path, flags), "r+b") as file:
        found = os.readlink(f"/proc/self/fd/{file.fileno()}")
        if found.removesuffix(" (deleted)") != f"/memfd:{memory.name}":
            raise OSError(f"{found} is at the place of {memory.name}")
        yield file


def _write(file: FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]


def _read(file: FileIO, size: int) -> bytearray:
    """Return what is there, at most ``size`` bytes."""
    content, done = bytearray(size), 0
    while done < size and (count := file.readinto(memoryview(content)[done:])):
        done += count
    return content[:done]
