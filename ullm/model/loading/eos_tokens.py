"""The tokens that end a text: the one rule for all checkpoints.

They are those of generation_config.json, or else of config.json, and the tokenizer's own end-of-sequence
token. Chat models need both: some name only the base model's token in their config, while their answers end
with the tokenizer's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ullm.config import ModelConfig
from ullm.errors import ModelFileBroken, ModelNotFound
from ullm.hub import locate
from ullm.hub.files import read_json, silent
from ullm.logs import get_logger
from ullm.tokenization.special_tokens import token_text, tokenizer_settings

log = get_logger(__name__)

LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys of the language model's own config, in models that also see or hear."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """The part of a tokenizer.json that names its added tokens; the rest is skipped."""

    added_tokens: list[_AddedToken] = []


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _TokenizerVocabulary(msgspec.Struct):
    model: _Vocabulary


def eos_token_ids(hf: dict[str, Any], path: Path, config: ModelConfig) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text, without repetitions.

    Args:
        hf: the content of config.json, or of a GGUF file's metadata in that form.
        path: the model's folder or GGUF file.
        config: may name another tokenizer.

    Raises:
        ModelFileBroken: a file cannot be read, or its ``eos_token_id`` is not a number or a list of numbers.
    """
    generation: dict[str, Any] = {}
    if path.suffix != ".gguf":
        generation = read_json(path / "generation_config.json", missing_ok=True)
    sources = (
        (path / "generation_config.json", generation),
        (path / "config.json", hf),
        *((path / "config.json", hf[name]) for name in LANGUAGE_PARTS if isinstance(hf.get(name), dict)),
    )
    listed = next((ids for file, source in sources if (ids := _listed(file, source))), [])
    tokenizer = _tokenizer_path(path, config)
    return tuple(dict.fromkeys([*listed, *(_own_tokens(tokenizer) if tokenizer is not None else [])]))


def _listed(file: Path, source: dict[str, Any]) -> list[int]:
    value = source.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
        raise ModelFileBroken(file, f"its eos_token_id is {value!r}, not a number or a list of numbers")
    return ids


def _tokenizer_path(path: Path, config: ModelConfig) -> Path | None:
    """Return the folder or GGUF file of the tokenizer; None if it is not on this machine."""
    if config.tokenizer is None:
        return path
    try:
        return locate(config.tokenizer, config, silent, weights=False)
    except ModelNotFound as error:
        log.warning("end-of-sequence token of --tokenizer is unknown in this worker", reason=str(error))
        return None


def _own_tokens(path: Path) -> list[int]:
    """Return the end-of-sequence tokens that a tokenizer itself names; a GGUF file may name several."""
    if path.suffix == ".gguf":
        from ullm.model.loading.gguf_file import GgufFile  # its libraries take long to import
        from ullm.model.loading.gguf_tokenizer import token_ids

        return _listed(path, token_ids(GgufFile(path)))
    settings = read_json(path / "tokenizer_config.json", missing_ok=True)
    special = read_json(path / "special_tokens_map.json", missing_ok=True)
    token = token_text(tokenizer_settings(settings, special).get("eos_token"))
    token_id = None if token is None else _find_token(path, settings, token)
    return [] if token_id is None else [token_id]


def _find_token(path: Path, settings: dict[str, Any], token: str) -> int | None:
    """Look a token up, in the smallest file first: a vocabulary may have many megabytes."""
    decoder = settings.get("added_tokens_decoder") or {}
    try:
        for number, entry in decoder.items():
            if token_text(entry) == token:
                return int(number)
    except (AttributeError, ValueError):
        config = path / "tokenizer_config.json"
        raise ModelFileBroken(config, "its added_tokens_decoder is not readable") from None
    file = path / "tokenizer.json"
    if not file.is_file():
        return None  # an older format, whose ids would have to be converted first
    try:
        content = file.read_bytes()
        added = msgspec.json.decode(content, type=_TokenizerFile).added_tokens
        by_text = {entry.content: entry.id for entry in added}
        if token in by_text:
            return by_text[token]
        vocabulary = msgspec.json.decode(content, type=_TokenizerVocabulary).model.vocab
    except (OSError, ValueError, RecursionError) as error:  # not JSON, not of these types, or not UTF-8
        raise ModelFileBroken(file, f"cannot be read: {error}") from None
    if isinstance(vocabulary, dict):
        return vocabulary.get(token)
    return next((index for index, (text, _) in enumerate(vocabulary) if text == token), None)
