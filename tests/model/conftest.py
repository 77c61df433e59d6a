"""One thread for all model tests, so that they do not fight each other for cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.model_fixtures import save_tiny


@pytest.fixture(autouse=True)
def _single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Llama's folder, and transformers' model."""
    path = tmp_path_factory.mktemp("llama")
    return path, save_tiny(path, "llama")
