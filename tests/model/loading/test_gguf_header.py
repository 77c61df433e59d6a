"""A header of a GGUF file that cannot be right: one line, and nothing of the size that it claims."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.model.gguf_fixtures import write_model
from ullm.errors import ModelFileBroken
from ullm.model.loading.gguf_file import MAX_ITEMS, GgufFile

UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9
COUNTS = 24
"""Bytes before the metadata."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def with_entry(model: bytes, key: str, value: bytes) -> bytes:
    """Put one more entry in front of the metadata."""
    magic, version, tensors, values = struct.unpack_from("<IIQQ", model)
    entry = struct.pack("<Q", len(key)) + key.encode() + value
    return struct.pack("<IIQQ", magic, version, tensors, values + 1) + entry + model[COUNTS:]


def with_offset(model: bytes, name: str, change: int) -> bytes:
    """Move the place that the header says a tensor has."""
    content = bytearray(model)
    place = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (dimensions,) = struct.unpack_from("<I", content, place)
    place += 4 + 8 * dimensions + 4
    (offset,) = struct.unpack_from("<Q", content, place)
    struct.pack_into("<Q", content, place, offset + change)
    return bytes(content)


def refusal(folder: Path, content: bytes) -> str:
    file = folder / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelFileBroken) as caught:
        GgufFile(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    return message


def test_a_key_that_is_there_twice(model: bytes, tmp_path: Path) -> None:
    twice = with_entry(model, "llama.rope.freq_base", struct.pack("<II", UINT32, 7))
    assert "the metadata have 'llama.rope.freq_base' twice" in refusal(tmp_path, twice)


def test_two_tensors_of_one_name(model: bytes, tmp_path: Path) -> None:
    twice = model.replace(b"blk.1.attn_k.weight", b"blk.1.attn_v.weight")
    assert "there are two tensors 'blk.1.attn_v.weight'" in refusal(tmp_path, twice)


@pytest.mark.parametrize(
    ("change", "message"),
    [(-32, "overlap"), (32, "overlap"), (4, "no multiple of 32"), (1, "no multiple of 32")],
)
def test_a_tensor_in_another_place(model: bytes, tmp_path: Path, change: int, message: str) -> None:
    assert message in refusal(tmp_path, with_offset(model, "blk.0.attn_q.weight", change))


@pytest.mark.parametrize("kind", [UINT8, STRING], ids=["numbers", "texts"])
def test_an_array_as_long_as_the_file(model: bytes, tmp_path: Path, kind: int) -> None:
    """All of its items would be in the file, which is zeros: the count is refused before they are read."""
    count = MAX_ITEMS + 1
    content = with_entry(model, "wide", struct.pack("<IIQ", ARRAY, kind, count) + b"\0" * 64)
    assert f"metadata 'wide' has {count} items; at most {MAX_ITEMS}" in refusal(tmp_path, content)


def test_arrays_in_arrays(model: bytes, tmp_path: Path) -> None:
    """A thousand would be more than Python's recursion."""
    nested = struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 1000
    assert "'deep' is an array of arrays" in refusal(tmp_path, with_entry(model, "deep", nested))


def test_a_tensor_that_is_in_two_parts(model: bytes, tmp_path: Path) -> None:
    whole = with_entry(model, "split.count", struct.pack("<II", UINT32, 2))
    first, other = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    filling = "x" * (-(len(whole) - len(model) + 16) % 32)  # so that the tensors stay where they are
    first.write_bytes(with_entry(whole, filling, struct.pack("<II", UINT32, 0)))
    other.write_bytes(model)
    with pytest.raises(ModelFileBroken, match="is in another part as well"):
        GgufFile(first)
