"""Local folders and GGUF files: what is found, and what is said when it is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer

from tests.model.gguf_fixtures import HIDDEN, VOCAB, finish, start_file
from ullm import hub
from ullm.config import EngineConfig
from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported
from ullm.hub.files import build_folder, silent
from ullm.model.loading.convert import write_tokenizer_of_folder
from ullm.testing import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that is whole as far as the front end looks."""
    folder = tmp_path / "model"
    tiny_tokenizer(folder)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"a": np.ones((4, 4), np.float32), "b": np.ones(8, np.float32)}, folder / "model.safetensors")
    return folder


def test_folder(folder: Path) -> None:
    model = hub.resolve(EngineConfig(model=str(folder)))
    assert model.path == model.tokenizer_path == folder
    assert model.name == "model"
    assert model.config == {"architectures": ["LlamaForCausalLM"]}
    assert model.generation_config == {}


def test_served_name_and_chat_template(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    config = EngineConfig(model=str(folder), served_model_name="mine", chat_template=str(template))
    model = hub.resolve(config)
    assert (model.name, model.chat_template) == ("mine", "{{ messages }}")


FILES = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja "
    "model.safetensors model.safetensors.index.json"
).split()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_not_read(folder: Path, name: str) -> None:
    """Where nobody writes into it, that would never end."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelFileBroken, match=rf"{name}: is a named pipe and not a file"):
        hub.resolve(EngineConfig(model=str(folder)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_no_option_takes_a_pipe(folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ModelNotFound, match="is a named pipe; --model takes a folder"):
        hub.resolve(EngineConfig(model=str(pipe)))
    with pytest.raises(ModelNotFound, match=r"--chat-template .* is a named pipe"):
        hub.resolve(EngineConfig(model=str(folder), chat_template=str(pipe)))
    other = tmp_path / "other"
    tiny_tokenizer(other)
    (other / "tokenizer_config.json").unlink(missing_ok=True)
    os.mkfifo(other / "tokenizer_config.json")
    with pytest.raises(ModelFileBroken, match="tokenizer_config"):
        hub.resolve(EngineConfig(model=str(folder), tokenizer=str(other)))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices")
def test_a_device_is_not_read(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ModelFileBroken, match="is a device"):
        hub.resolve(EngineConfig(model=str(folder)))


def test_tokenizer_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "other")
    model = hub.resolve(EngineConfig(model=str(folder), tokenizer=str(tmp_path / "other")))
    assert model.tokenizer_path == tmp_path / "other"
    assert model.path == folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nothing/here", "no such folder"),
        ("/nothing/here", "no such folder"),
        ("owner/name", "HF_HUB_OFFLINE"),
        ("owner/name/file.gguf", "HF_HUB_OFFLINE"),
    ],
)
def test_no_such_model(name: str, says: str) -> None:
    with pytest.raises(ModelNotFound, match=says) as caught:
        hub.resolve(EngineConfig(model=name))
    assert name.removesuffix("/file.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_gguf(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"not a \.gguf file"):
        hub.resolve(EngineConfig(model=str(folder / "config.json")))


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        hub.resolve(EngineConfig(model=str(folder)))


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelFileBroken, match=r"config\.json"):
        hub.resolve(EngineConfig(model=str(folder)))


def test_missing_chat_template(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"--chat-template /nothing: No such file"):
        hub.resolve(EngineConfig(model=str(folder), chat_template="/nothing"))


@pytest.mark.parametrize(
    ("keep", "says"), [(-1, "tensor [ab] ends"), (40, "header"), (3, "header"), (0, "header")]
)
def test_truncated_weights(folder: Path, keep: int, says: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFileBroken, match=f"model.safetensors: truncated: .*{says}"):
        hub.resolve(EngineConfig(model=str(folder)))


def test_weights_that_are_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello world")
    with pytest.raises(ModelFileBroken, match="not that of a safetensors file"):
        hub.resolve(EngineConfig(model=str(folder)))


def test_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileBroken, match=r"model-00002\.safetensors: missing"):
        hub.resolve(EngineConfig(model=str(folder)))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnsupported, match=r"no \.safetensors file"):
        hub.resolve(EngineConfig(model=str(folder)))
    assert hub.resolve(EngineConfig(model=str(folder), load_format="dummy")).path == folder


@pytest.mark.process
def test_gguf_tokenizer_and_config_are_written_once(tiny_gguf: Path) -> None:
    seen: list[str] = []
    model = hub.resolve(EngineConfig(model=str(tiny_gguf)), lambda label, done, total: seen.append(label))
    assert model.path == tiny_gguf
    assert model.config["architectures"] == ["LlamaForCausalLM"]
    assert (model.tokenizer_path / "tokenizer.json").is_file()
    assert set(seen) == {"reading the tokenizer of tiny.gguf"}
    seen.clear()
    assert hub.resolve(EngineConfig(model=str(tiny_gguf)), lambda *_: seen.append("again")) == model
    assert seen == []


@pytest.mark.process
def test_broken_gguf(tiny_gguf: Path, caches: Path) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:1000])
    with pytest.raises(ModelFileBroken, match=r"tiny\.gguf"):
        hub.resolve(EngineConfig(model=str(tiny_gguf)))
    assert [path.name for path in (caches / "tokenizers").iterdir() if path.is_dir()] == []


@pytest.mark.process
def test_folder_without_any_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelNotFound, match="has no tokenizer; fetch"):
        hub.resolve(EngineConfig(model=str(folder)))


@pytest.mark.process
def test_progress_may_cancel(tiny_gguf: Path, caches: Path) -> None:
    def cancel(label: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve(EngineConfig(model=str(tiny_gguf)), cancel)
    assert [path.name for path in (caches / "tokenizers").iterdir() if path.is_dir()] == []


BUILD = """
import sys
from pathlib import Path
from ullm.hub.files import build_folder, silent
with build_folder(Path(sys.argv[1]), "build", silent) as partial:
    if partial is None:
        print("found")
    else:
        (partial / "file").write_text("x" * 100)
        print("built")
"""


@pytest.mark.process
def test_many_processes_build_once(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "thing"
    command = [sys.executable, "-c", BUILD, str(target)]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = sorted(builder.communicate()[0].strip() for builder in builders)
    assert said == ["built", "found", "found", "found"]
    assert (target / "file").read_text() == "x" * 100


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "thing"

    def build() -> None:
        with build_folder(target, "build", silent) as partial:
            assert partial is not None
            (partial / "half").write_text("")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".partial-thing-0123"
    leftover.mkdir()
    with build_folder(tmp_path / "thing", "build", silent) as partial:
        assert partial is not None
        assert not leftover.exists()


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hub.cache_dir() == tmp_path / "ullm-cache"
    monkeypatch.delenv("ULLM_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hub.cache_dir() == Path("/x/ullm")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert hub.cache_dir() == Path("/local/ullm/Cache")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("HOME", "/home/x")
    assert hub.cache_dir() == Path("/home/x/Library/Caches/ullm")


def test_another_tokenizer_really_replaces_that_of_a_gguf_file(tmp_path: Path) -> None:
    """Also where the file's own cannot be read, whose error recommends the option."""
    file = tmp_path / "model.gguf"
    writer = start_file(file)
    writer.add_tokenizer_model("rwkv")
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    finish(writer)
    with pytest.raises(ModelUnsupported, match=r"its tokenizer is 'rwkv'.* with --tokenizer"):
        hub.resolve(EngineConfig(model=str(file)))
    tiny_tokenizer(tmp_path / "other")
    model = hub.resolve(EngineConfig(model=str(file), tokenizer=str(tmp_path / "other")))
    assert model.tokenizer_path == tmp_path / "other"
    assert model.config["hidden_size"] == HIDDEN
    assert model.generation_config["eos_token_id"] == 2


def write_sentencepiece(folder: Path) -> Path:
    """Write a model folder whose tokenizer is only a tokenizer.model."""
    folder.mkdir()
    with (folder / "tokenizer.model").open("wb") as out:
        SentencePieceTrainer.train(
            sentence_iterator=iter([f"{word} and {word}s" for word in "tree house river lamp".split()]),
            model_writer=out,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return folder


def test_a_tokenizer_model_alone_is_read(tmp_path: Path) -> None:
    folder, out = write_sentencepiece(tmp_path / "model"), tmp_path / "out"
    write_tokenizer_of_folder(folder, out)
    ours, original = Tokenizer.from_file(str(out / "tokenizer.json")), SentencePieceProcessor()
    original.load(str(folder / "tokenizer.model"))
    for text in ("trees and rivers", "größer 😀", "  two  spaces"):
        assert ours.encode(text, add_special_tokens=False).ids == original.encode(text)


def test_the_packages_that_it_needs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sentencepiece(tmp_path / "model")
    monkeypatch.setattr("ullm.model.loading.convert.is_installed", lambda module: module != "sentencepiece")
    with pytest.raises(
        ModelUnsupported, match=r"sentencepiece must be installed: pip install 'ullm-engine\["
    ):
        write_tokenizer_of_folder(folder, tmp_path / "out")


def test_a_folder_without_any_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelFileBroken, match="has no file that a tokenizer can be made of") as caught:
        write_tokenizer_of_folder(tmp_path, tmp_path / "out")
    assert "--tokenizer" in str(caught.value)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_tokenizers_own_code_runs_only_if_it_is_trusted(tmp_path: Path, trusted: bool) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    tiny_tokenizer(tmp_path / "plain")
    folder.mkdir()
    (tmp_path / "plain" / "tokenizer.json").rename(folder / "vocabulary.json")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [null, "own.OwnTokenizer"]}}'
    )
    (folder / "own.py").write_text(
        "from tokenizers import Tokenizer\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    vocab_files_names = {'vocab_file': 'vocabulary.json'}\n"
        "    def __init__(self, vocab_file=None, **options):\n"
        "        super().__init__(tokenizer_object=Tokenizer.from_file(vocab_file), **options)\n"
    )
    if trusted:
        write_tokenizer_of_folder(folder, out, trust_remote_code=True)
        assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() > 256
        return
    with pytest.raises(ModelFileBroken, match="use --trust-remote-code if you trust it") as caught:
        write_tokenizer_of_folder(folder, out)
    assert "\n" not in str(caught.value)
