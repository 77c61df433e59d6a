"""KV blocks out of one worker's pool and into another's: what arrives, and what is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from ullm.actors.shared_segments import SharedSegments, open_segments
from ullm.config import EngineConfig
from ullm.protocol.messages import (
    BlocksExported,
    BlocksImported,
    ExportBlocks,
    FromWorker,
    ImportBlocks,
    NewSequence,
    RankSpec,
    Ready,
    ScheduledSequence,
    SharedMemory,
    Sleep,
    Start,
    Step,
)
from ullm.sampling import SamplingParams
from ullm.testing import ScriptedRunner
from ullm.worker.loop import WorkerLoop

TOKENS = [300 + place for place in range(32)]
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")


class Worker:
    """A worker loop, and what it has answered."""

    def __init__(self, model: str = "scripted:") -> None:
        self.answers: list[FromWorker] = []
        self.loop = WorkerLoop(ScriptedRunner(), self.answers.append)
        self.loop.handle(Start(EngineConfig(num_blocks=8), RankSpec(), model))

    @property
    def identity(self) -> str:
        """What its KV is of."""
        return next(answer.info.kv_identity for answer in self.answers if isinstance(answer, Ready))

    def compute(self, block_ids: list[int], cached: int = 0) -> None:
        """Compute `TOKENS`, of which the first are in the blocks already."""
        new = NewSequence(1, TOKENS, len(TOKENS), SamplingParams(seed=1), block_ids, cached)
        self.loop.handle(Step(1, [ScheduledSequence(1, cached, len(TOKENS) - cached, False)], [new]))

    def export(
        self, block_ids: list[int], memory: SharedMemory | None = None, **other: str
    ) -> BlocksExported:
        """Have it export blocks."""
        self.loop.handle(ExportBlocks(1, block_ids, other.get("identity", self.identity), memory))
        answer = self.answers[-1]
        assert isinstance(answer, BlocksExported)
        return answer

    def take(self, exported: BlocksExported, block_ids: list[int], **other: object) -> BlocksImported:
        """Have it import blocks."""
        values = {"size": exported.size, "checksum": exported.checksum, "content": exported.content}
        self.loop.handle(ImportBlocks(2, block_ids, **{"identity": self.identity, **values, **other}))  # type: ignore[arg-type]
        answer = self.answers[-1]
        assert isinstance(answer, BlocksImported)
        return answer


@pytest.fixture
def source() -> Worker:
    """A worker that has computed two blocks."""
    worker = Worker()
    worker.compute([2, 3])
    return worker


@pytest.fixture
def segments() -> Iterator[SharedSegments]:
    """Shared memory for one rank."""
    with open_segments(1) as found:
        assert found is not None
        yield found


@linux
def test_what_is_exported_is_cached_elsewhere(source: Worker, segments: SharedSegments) -> None:
    """The scripted runner refuses a cached prefix that is not in the blocks."""
    target, memory = Worker(), segments.of(0)
    exported = source.export([2, 3], memory)
    assert (exported.size, exported.content, exported.error) == (32 * 8, b"", "")
    assert target.take(exported, [5, 1], memory=memory) == BlocksImported(2)
    target.compute([5, 1, 7], cached=32 - 16)


def test_without_shared_memory_it_is_in_the_frames(source: Worker) -> None:
    target = Worker()
    exported = source.export([2, 3])
    assert len(exported.content) == exported.size == 32 * 8
    assert target.take(exported, [5, 1]).error == ""
    target.compute([5, 1, 7], cached=32 - 16)


@pytest.mark.parametrize("first", [0, 100])
def test_what_is_corrupt_does_not_get_into_the_pool(source: Worker, first: int) -> None:
    target, exported = Worker(), source.export([2, 3])
    content = bytearray(exported.content)
    content[first] ^= 1
    assert "corrupt" in target.take(exported, [5, 1], content=bytes(content)).error
    assert "corrupt" in target.take(exported, [5, 1], content=exported.content[:-1]).error
    assert target.export([5, 1]).content == bytes(32 * 8)


def test_kv_of_another_identity_is_refused(source: Worker) -> None:
    other = Worker("scripted:first_token=4")
    assert other.identity != source.identity
    assert "other weights" in other.take(source.export([2, 3]), [5, 1], identity=source.identity).error
    assert "other weights" in source.export([2, 3], identity=other.identity).error
    assert "other weights" in source.export([2, 3], identity="").error


def test_blocks_that_do_not_exist_are_refused(source: Worker) -> None:
    assert "no such KV blocks" in source.export([8]).error
    assert "no such KV blocks" in source.take(source.export([2]), [-1]).error


def test_asleep_there_is_no_pool(source: Worker) -> None:
    source.loop.handle(Sleep(1))
    assert "no KV pool" in source.export([2]).error
    assert "no KV pool" in source.take(BlocksExported(1), [2]).error


@linux
def test_another_file_at_the_place_of_the_memory_stays_as_it_is(
    source: Worker, segments: SharedSegments, tmp_path: object
) -> None:
    """The engine may have closed the memory, and its descriptor may be another file by now."""
    path = f"{tmp_path}/journal"
    with open(path, "wb") as file:
        file.write(b"precious")
    answer = source.export([2, 3], SharedMemory(path, segments.of(0).name))
    assert answer.no_memory
    assert source.take(BlocksExported(1, 8, 0), [4], memory=SharedMemory(path, "x")).no_memory
    assert source.export([2, 3], SharedMemory(f"{tmp_path}/nothing", "x")).no_memory
    with open(path, "rb") as file:
        assert file.read() == b"precious"


@linux
def test_the_memory_is_in_no_folder_and_ends_with_its_context() -> None:
    before = set(os.listdir("/dev/shm"))
    with open_segments(2) as segments:
        assert segments is not None
        assert set(os.listdir("/dev/shm")) <= before
        paths = [segments.of(rank).path for rank in range(2)]
        assert all(map(os.path.exists, paths))
    assert not any(map(os.path.exists, paths))
