"""Seeded ways to damage a file: its bytes, its numbers, the values in its JSON, or what is at its place."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NUMBERS = [0, 1, -1, 2, 7, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 33, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1]
VALUES: list[Any] = [
    *NUMBERS,
    *(10**40, 0.5, -0.0, 1e30, float("nan"), float("inf"), "", "0", "x", "F64", "I4", "../config.json"),
    *("/etc/hostname", "model.safetensors", "model.safetensors.index.json", "config.json", ".", "a\0b"),
    *("\ud800", None, True, False, [], {}, [0], [[]], ["x"], {"x": 1}, {"content": "x"}, {"content": 1}),
    *([1 << 40, 1 << 40], [0, 1 << 62], [64, 1 << 31], [-4, 4], [8, 4]),
]
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""GGUF's types of numbers → bytes."""
STRING, ARRAY = 8, 9

Content = Callable[[bytearray, random.Random], None]
Place = Callable[[Path, random.Random], None]


def truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def flip(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(min(len(content), 4096))] ^= 1 << rng.randrange(8)


def huge_number(content: bytearray, rng: random.Random) -> None:
    """Write a length near the limits of 32 or 64 bits anywhere into the header."""
    size, place = rng.choice([4, 8]), rng.randrange(min(len(content), 2048))
    content[place : place + size] = number(rng, size)


def number(rng: random.Random, size: int) -> bytes:
    return (rng.choice(NUMBERS) % (1 << (8 * size))).to_bytes(size, "little")


def digits(content: bytearray, rng: random.Random) -> None:
    """Change digits, which are offsets, shapes and ids in files of JSON."""
    places = [place for place, byte in enumerate(content[:8192]) if 48 <= byte <= 57]
    for place in rng.sample(places, min(len(places), rng.randint(1, 6))):
        content[place] = rng.choice(b"0123456789-[.")


def swap(content: bytearray, rng: random.Random) -> None:
    """Exchange two stretches, so that parts of the header refer to others."""
    first, second = sorted(rng.sample(range(min(len(content), 2048)), 2))
    length = rng.randint(1, 64)
    one, other = bytes(content[first : first + length]), bytes(content[second : second + length])
    content[second : second + length] = one
    content[first : first + length] = other


def repeat(content: bytearray, rng: random.Random) -> None:
    """Insert a stretch of the file again."""
    start = rng.randrange(min(len(content), 2048))
    content[start:start] = content[start : start + rng.randint(1, 200)] * rng.randint(1, 3)


def deepen(content: bytearray, rng: random.Random) -> None:
    """Put more brackets somewhere than Python's recursion bears."""
    place = rng.randrange(min(len(content), 2048))
    content[place:place] = rng.choice([b"[", b'{"a":']) * rng.choice([10, 500, 5000, 100_000])


BYTES: tuple[Content, ...] = (truncate, flip, huge_number, digits, swap, repeat, deepen)


def change_json(content: bytearray, rng: random.Random) -> None:
    """Change some values in a file of JSON: replace, drop, rename, nest or exchange them."""
    value = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        change_value(value, rng)
    content[:] = json.dumps(value).encode()


def change_value(value: Any, rng: random.Random) -> None:
    places = list(places_in(value))
    if not places:
        return
    container, key = rng.choice(places)
    match rng.choice(["set", "set", "drop", "nest", "copy", "rename"]):
        case "set":
            container[key] = copy.deepcopy(rng.choice(VALUES))
        case "drop":
            del container[key]
        case "nest":
            container[key] = rng.choice([[container[key]], {str(key): container[key]}])
        case "copy":
            other, place = rng.choice(places)
            container[key] = copy.deepcopy(other[place])
        case "rename" if isinstance(container, dict):
            container[rng.choice(["x", "", key.upper(), f"{key}.weight"])] = container.pop(key)


def places_in(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """All places within a value; of long lists and large objects, such as vocabularies, only a few."""
    if depth > 6:
        return
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys[:60]:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places_in(value[key], depth + 1)


def change_safetensors(content: bytearray, rng: random.Random) -> None:
    """Change the header of a safetensors file, and its length accordingly."""
    (length,) = struct.unpack_from("<Q", content)
    header = content[8 : 8 + length]
    change_json(header, rng)
    content[: 8 + length] = struct.pack("<Q", len(header)) + header


def change_gguf(content: bytearray, rng: random.Random) -> None:
    """Change some numbers of a GGUF header: counts, lengths, types, values, dimensions or offsets."""
    places = list(gguf_numbers(content))
    for place, size in rng.sample(places, rng.randint(1, 2)):
        content[place : place + size] = number(rng, size)


def gguf_numbers(content: bytes) -> Iterator[tuple[int, int]]:
    """The place and the size of every number in a GGUF header; of long arrays, of the first few items."""
    yield from ((4, 4), (8, 8), (16, 8))
    tensors, values = struct.unpack_from("<QQ", content, 8)
    place = 24
    for _ in range(values):
        (length,) = struct.unpack_from("<Q", content, place)
        yield place, 8
        place += 8 + length
        (kind,) = struct.unpack_from("<I", content, place)
        yield place, 4
        place += 4
        count = 1
        if kind == ARRAY:
            kind, count = struct.unpack_from("<IQ", content, place)
            yield from ((place, 4), (place + 4, 8))
            place += 12
        for item in range(count):
            size = SCALARS.get(kind, 8)
            if item < 3:
                yield place, size
            place += size + (struct.unpack_from("<Q", content, place)[0] if kind == STRING else 0)
    for _ in range(tensors):
        (length,) = struct.unpack_from("<Q", content, place)
        yield place, 8
        place += 8 + length
        (dimensions,) = struct.unpack_from("<I", content, place)
        sizes = [4, *[8] * dimensions, 4, 8]
        for size in sizes:
            yield place, size
            place += size


def nothing(file: Path, rng: random.Random) -> None:
    file.unlink()


def empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def link(file: Path, rng: random.Random) -> None:
    """Put a link there: to itself, to nothing, to its folder, or to another file."""
    target = rng.choice([file.name, "none", ".", "..", *sorted(os.listdir(file.parent))])
    file.unlink()
    file.symlink_to(target)


def folder(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path, rng: random.Random) -> None:
    """A named pipe, which nobody writes to."""
    file.unlink()
    os.mkfifo(file)


PLACES: tuple[Place, ...] = (nothing, empty, link, folder, pipe)


def change_format(content: bytearray, rng: random.Random, suffix: str) -> None:
    """Change what a file says, in its own format."""
    changes = {".json": change_json, ".safetensors": change_safetensors, ".gguf": change_gguf}
    changes.get(suffix, flip)(content, rng)


def corrupt(file: Path, rng: random.Random) -> str:
    """Damage a file; return the name of the damage."""
    group = rng.choice(["bytes", "bytes", "bytes", "format", "format", "format", "place"])
    if group == "place":
        change = rng.choice(PLACES)
        change(file, rng)
        return change.__name__
    content = bytearray(file.read_bytes())
    damage = rng.choice(BYTES)
    if group == "format":
        change_format(content, rng, file.suffix)
    else:
        damage(content, rng)
    file.unlink()  # a mapped file that shrinks would end the process that maps it
    file.write_bytes(content)
    return damage.__name__ if group == "bytes" else f"{group} {file.suffix}"
