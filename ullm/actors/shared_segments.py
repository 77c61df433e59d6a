"""Shared memory for what workers of one host hand to each other; no folder ever has it.

Each segment is a descriptor of this process, which workers open through ``/proc``. The system frees it when
the last of them has closed it, however it ends.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ullm.logs import get_logger
from ullm.machine import open_memory
from ullm.protocol.messages import SharedMemory

log = get_logger(__name__)


class SharedSegments:
    """One segment for each rank, which grows as it is written to."""

    def __init__(self, descriptors: list[int], names: list[str]) -> None:
        self._descriptors = descriptors
        self._names = names

    def of(self, rank: int) -> SharedMemory:
        """Return how a worker opens the segment of a rank."""
        return SharedMemory(f"/proc/{os.getpid()}/fd/{self._descriptors[rank]}", self._names[rank])

    def corrupt(self) -> None:
        """Change a byte of the first rank's content, as an injected fault."""
        first = self._descriptors[0]
        with os.fdopen(os.dup(first), "r+b", buffering=0) as file:
            byte = file.read(1)
            file.seek(0)
            file.write(bytes([byte[0] ^ 0xFF]))


@contextmanager
def open_segments(ranks: int) -> Iterator[SharedSegments | None]:
    """Open segments for some ranks; yield None on systems that have no such memory."""
    if sys.platform != "linux":
        yield None
        return
    with ExitStack() as stack:
        descriptors, names = [], []
        try:
            for _ in range(ranks):
                names.append(f"ullm-kv-{secrets.token_hex(8)}")
                descriptors.append(open_memory(names[-1], 0))
                stack.callback(os.close, descriptors[-1])
        except OSError as error:
            log.info("no shared memory for KV, it goes through pipes", cause=error.strerror or str(error))
            descriptors = []
        yield SharedSegments(descriptors, names) if descriptors else None
