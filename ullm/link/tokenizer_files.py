"""A tokenizer's files, as an engine gives them to front ends, which have no model of their own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ullm.errors import ResourceUnavailable
from ullm.hub import LocalModel, cache_dir

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files that `TokenizerActor.load` reads, beside the templates of `TEMPLATES`."""
TEMPLATES = "additional_chat_templates"


def read(folder: Path) -> dict[str, bytes]:
    """Return the files of a tokenizer's folder: path within it → content."""
    paths = [folder / name for name in NAMES] + sorted((folder / TEMPLATES).glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def digest(files: Mapping[str, bytes], chat_template: str | None, *, special_tokens_in_text: bool) -> str:
    """Return a name for what the files and the options of the tokenizer say together."""
    state = hashlib.sha256(repr((chat_template, special_tokens_in_text)).encode())
    for name, content in sorted(files.items()):
        state.update(f"{name}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


def keep(name: str, files: Mapping[str, bytes]) -> Path:
    """Write files to a folder of the cache that all front ends share, unless it is there; return it.

    Args:
        name: from `digest`.

    Raises:
        ConfigError: the cache cannot be written to, or a name is not one of a tokenizer's files.
    """
    if not re.fullmatch("[0-9a-f]{64}", name):
        raise ResourceUnavailable(f"the engine calls its tokenizer {name[:80]!r}, which is no digest")
    folder = cache_dir() / "tokenizers" / name[:32]
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    except OSError as error:
        raise ResourceUnavailable(
            f"{folder.parent}: {error.strerror or error}; a front end keeps the tokenizer there, set "
            "ULLM_CACHE to a folder that it may write to"
        ) from None
    try:
        for path, content in files.items():
            _check(path)
            (made / path).parent.mkdir(exist_ok=True)
            (made / path).write_bytes(content)
        os.replace(made, folder)
    except OSError as error:
        if not folder.is_dir():  # else another front end was quicker
            raise ResourceUnavailable(f"{folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _check(path: str) -> None:
    folder, _, name = path.rpartition("/")
    if path not in NAMES and not (folder == TEMPLATES and name.endswith(".jinja") and "\\" not in name):
        raise ResourceUnavailable(f"the engine sent a file {path!r}, which is none of a tokenizer's")


def local_model(
    name: str, folder: Path, chat_template: str | None, *, special_tokens_in_text: bool
) -> LocalModel:
    """Return a model that has a tokenizer, and nothing else."""
    return LocalModel(
        name=name,
        path=folder,
        config={},
        tokenizer_path=folder,
        chat_template=chat_template,
        special_tokens_in_text=special_tokens_in_text,
    )
