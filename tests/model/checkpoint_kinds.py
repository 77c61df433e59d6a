"""Checkpoints of every kind that is loaded in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from tests.model.gguf_fixtures import write_model
from tests.model.model_fixtures import SHAPE, save_tiny
from ullm.protocol.messages import Progress


def write_foreign(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = SHAPE | {"intermediate_size": 128, "initializer_range": 0.2}
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)).save_pretrained(folder)
    return folder


def write_native(folder: Path) -> Path:
    save_tiny(folder, "llama-bias")
    return folder


def write_tied(folder: Path) -> Path:
    save_tiny(folder, "llama-tied")
    return folder


def write_gguf(folder: Path) -> Path:
    return write_model(folder / "model.gguf")


KINDS: dict[str, Callable[[Path], Path]] = {
    "native": write_native,
    "tied": write_tied,
    "foreign": write_foreign,
    "gguf": write_gguf,
}


def quiet(_: Progress) -> None:
    """Ignore a progress message."""
