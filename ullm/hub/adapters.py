"""The files of a LoRA adapter, as peft saves them: found, and told apart by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported
from ullm.hub.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHUNK = 1 << 24
"""Bytes that are read at a time."""


def find_adapter(path: Path | str) -> tuple[Path, str]:
    """Return the folder of an adapter, and the digest of its files.

    The digest tells a worker that is restarted later whether the files are still those that were loaded.

    Raises:
        ModelNotFound: there is no such folder, or a file is missing.
        ModelUnsupported: the weights are a pickle, whose loading may run code.
        ModelFileBroken: the config is not a JSON object, or a file cannot be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModelNotFound(f"{path} is no folder; an adapter is a local folder with {CONFIG} and {WEIGHTS}")
    folder = folder.resolve()
    if not (folder / CONFIG).is_file():
        raise ModelNotFound(f"{folder}: has no {CONFIG}; save the adapter with peft's save_pretrained")
    read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ModelUnsupported(f"{folder}: adapter_model.bin may run code; save it again as safetensors")
        raise ModelNotFound(f"{folder}: has no {WEIGHTS}; save the adapter with peft's save_pretrained")
    return folder, digest(folder)


def digest(folder: Path) -> str:
    """Return a digest of the files that an adapter is made of.

    Raises:
        ModelFileBroken: one cannot be read.
    """
    whole = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        try:
            with (folder / name).open("rb") as file:
                whole.update((folder / name).stat().st_size.to_bytes(8, "little"))
                while chunk := file.read(CHUNK):
                    whole.update(chunk)
        except OSError as error:
            raise ModelFileBroken(folder / name, f"cannot be read: {error.strerror or error}") from None
    return whole.hexdigest()
