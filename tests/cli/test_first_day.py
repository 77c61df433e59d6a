"""What a newcomer tries on the first day: odd folders, switches with values, `help` and `dir`."""

from __future__ import annotations

import dataclasses
import pydoc
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import ullm
from ullm.cli.app import main
from ullm.cli.doctor import Check, Diagnosis, show_diagnosis
from ullm.cli.flags import with_switches

CONFIG = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": ""}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "{folder} is empty; fetch the model into it, or name another folder"),
        (ADAPTER, "{folder} holds a LoRA adapter and no model; give its base model as --model"),
        (
            {"config.json": CONFIG, "model.safetensors": ""},
            "{folder} has no tokenizer; fetch its tokenizer.json",
        ),
        (
            {"model-Q4_0.gguf": ""},
            "{folder} holds GGUF files; name one of them, as in {folder}/model-Q4_0.gguf",
        ),
        ({"notes.txt": ""}, "{folder} has no config.json; name a folder as save_pretrained writes it"),
        (
            {"config.json": CONFIG, "tokenizer.json": "{}", "pytorch_model.bin": ""},
            "{folder}: pytorch_model.bin may run code and is not read; save the model again as safetensors",
        ),
    ],
    ids=["empty", "adapter", "no tokenizer", "gguf", "no config", "pickle"],
)
@pytest.mark.parametrize("command", [["generate", "hi"], ["doctor"], ["pull"]], ids=lambda line: line[0])
def test_a_folder_without_a_model_says_what_it_holds(
    command: list[str], files: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    line = [*command, "--model", str(folder)] if command[0] == "generate" else [*command, str(folder)]
    assert main(line) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {says.format(folder=folder)}")


@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        ("serve --prefix-cache false", "serve --prefix-cache=false"),
        ("serve m --enable-prefix-caching False", "serve m --enable-prefix-caching=false"),
        ("generate --prefix-cache true hi", "generate --prefix-cache=true hi"),
        ("serve --prefix-cache maybe", "serve --prefix-cache maybe"),
        ("serve --model false", "serve --model false"),
        ("generate -- --prefix-cache false", "generate -- --prefix-cache false"),
    ],
)
def test_a_switch_may_have_a_value(line: str, becomes: str) -> None:
    assert with_switches(line.split()) == becomes.split()


def test_a_switch_with_a_value_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prefix-cache", "false", "hi", "--model", "/nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: /nothing: no such folder")


def test_dir_shows_what_is_public() -> None:
    assert [name for name in dir(ullm) if not name.startswith("__")] == sorted(
        name for name in ullm.__all__ if not name.startswith("__")
    )
    assert set(ullm.__all__) <= set(dir(ullm))


def words(text: str) -> str:
    """Return a text on one line, without the bars that help draws at its left."""
    return " ".join(text.replace("|", " ").split())


@pytest.mark.parametrize("cls", [ullm.EngineConfig, ullm.ServerConfig])
def test_help_shows_what_each_option_means(cls: type) -> None:
    text = words(pydoc.plain(pydoc.render_doc(cls)))
    meanings = (words(f"{spec.name}: {spec.metadata['help']}") for spec in dataclasses.fields(cls))
    missing = [meaning for meaning in meanings if meaning not in text]
    assert missing == []


def test_a_diagnosis_on_a_narrow_terminal_has_all_its_words() -> None:
    path = "/a/very/long/path/that/no/line/of/forty/columns/holds/SmolLM2"
    written = StringIO()
    show_diagnosis(Diagnosis([Check("disk", "ok", f"free at {path}")], {}), Console(file=written, width=40))
    assert path in "".join(written.getvalue().split())
