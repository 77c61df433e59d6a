"""What entry points ask of Python's collector of garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from ullm.machine import YOUNG_OBJECTS, collect_rarely


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """A number for each collection; thresholds are as before afterwards."""
    seen: list[int] = []
    before = gc.get_threshold()

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(count)
    yield seen
    gc.callbacks.remove(count)
    gc.set_threshold(*before)


def test_a_burst_of_objects_is_no_reason_to_look(collections: list[int]) -> None:
    collect_rarely()
    gc.collect()
    collections.clear()
    for _ in range(50):
        burst = [[number] for number in range(YOUNG_OBJECTS // 2)]
        del burst
    assert collections == []


def test_garbage_is_found_nevertheless(collections: list[int]) -> None:
    collect_rarely()
    gc.collect()
    collections.clear()
    for _ in range(2 * YOUNG_OBJECTS):
        ring: list[object] = []
        ring.append(ring)
    assert collections
