"""A thousand corrupt files: each is refused in one line, or what it says can be run."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model.gguf_fixtures import write_model
from tests.model.model_fixtures import LogitsModel, save_tiny
from ullm.actors.tokenizer import TokenizerActor
from ullm.errors import UllmError
from ullm.hub.files import check_weights
from ullm.testing import local_model, tiny_tokenizer

SECONDS = 20.0
"""Time within which a corrupt file of a few hundred kilobytes must be refused, on a busy machine."""


def truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def flip(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(min(len(content), 4096))] ^= 1 << rng.randrange(8)


def huge_number(content: bytearray, rng: random.Random) -> None:
    """Write a length near the limits of 32 or 64 bits anywhere into the header."""
    size, place = rng.choice([4, 8]), rng.randrange(min(len(content), 2048))
    number = rng.choice([0, 1, (1 << (8 * size)) - 1, 1 << (8 * size - 1), 1 << (4 * size), 1 << 33])
    content[place : place + size] = (number % (1 << (8 * size))).to_bytes(size, "little")


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


MUTATIONS = (truncate, flip, huge_number, digits, swap, repeat)


def load_model(folder: Path) -> None:
    check_weights(folder)
    LogitsModel(folder, cpu_kernels=False)


def load_gguf(folder: Path) -> None:
    LogitsModel(folder / "model.gguf", cpu_kernels=False)


def load_tokenizer(folder: Path) -> None:
    tokenizer = TokenizerActor(local_model(folder))
    tokenizer.load()
    tokenizer.decode([0, 1, 300])


def write_shards(folder: Path) -> None:
    save_tiny(folder, "qwen3", max_shard_size="60KB")


FILES: dict[str, tuple[Callable[[Path], object], str, Callable[[Path], None]]] = {
    "safetensors": (lambda folder: save_tiny(folder, "llama"), "model.safetensors", load_model),
    "shard": (write_shards, "model-00001-of-*.safetensors", load_model),
    "index": (write_shards, "model.safetensors.index.json", load_model),
    "config": (lambda folder: save_tiny(folder, "qwen2"), "config.json", load_model),
    "gguf": (lambda folder: write_model(folder / "model.gguf"), "model.gguf", load_gguf),
    "tokenizer": (tiny_tokenizer, "tokenizer.json", load_tokenizer),
    "tokenizer_config": (tiny_tokenizer, "tokenizer_config.json", load_tokenizer),
}


def attempt(load: Callable[[Path], None], folder: Path, what: str) -> str:
    """Load a model; return why it is refused, or nothing."""
    try:
        load(folder)
    except UllmError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    return ""


def run(kind: str, folder: Path, seeds: range) -> int:
    """Load one file in as many corrupt versions; return how many were refused."""
    write, pattern, load = FILES[kind]
    folder.mkdir()
    write(folder)
    if kind.startswith("tokenizer"):
        (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    file = next(folder.glob(pattern))
    original, refused = file.read_bytes(), 0
    for seed in seeds:
        rng = random.Random(f"{kind} {seed}")
        content = bytearray(original)
        mutation = rng.choice(MUTATIONS)
        mutation(content, rng)
        # A new file each time: a mapped one that shrinks would end this process.
        copy = Path(shutil.copytree(folder, folder.parent / f"{kind}-{seed}"))
        changed = copy / file.name
        changed.unlink()
        changed.write_bytes(content)
        began, what = time.monotonic(), f"seed {seed}, {mutation.__name__}"
        refusal = attempt(load, copy, what)
        assert "\n" not in refusal, what
        assert time.monotonic() - began < SECONDS, what
        refused += bool(refusal)
        shutil.rmtree(copy)
    return refused


@pytest.mark.parametrize("kind", FILES)
def test_a_few_corrupt_files(kind: str, tmp_path: Path) -> None:
    assert run(kind, tmp_path / "whole", range(12)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_a_thousand_corrupt_files(kind: str, tmp_path: Path) -> None:
    assert run(kind, tmp_path / "whole", range(12, 160)) > 10
