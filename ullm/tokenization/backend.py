"""The tokenizer library's object, from its file."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ullm.errors import ModelFileBroken, one_line
from ullm.logs import get_logger
from ullm.tokenization.special_tokens import (
    DECODER,
    EXTRA,
    OLDER_EXTRA,
    named_tokens,
    token_text,
    tokenizer_settings,
)

log = get_logger(__name__)


PANIC = "PanicException"
"""The class of a panic in a library in Rust, which is no Exception and cannot be imported."""
_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a surrogate pair, as JSON writes it."""
MAX_BYTES = 100_000_000
"""Of a file of JSON beside the tokenizer's; a large vocabulary of added tokens has a tenth of that."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def load_backend(file: Path) -> Backend:
    """Return the tokenizer that a ``tokenizer.json`` describes, without truncation and padding.

    Tokens that only the files beside it name are added, as transformers does.

    Raises:
        ModelFileBroken: there is no such file, or it is not a tokenizer, or one beside it cannot be read.
    """
    if not file.is_file():
        raise ModelFileBroken(file, "no such file; name the tokenizer's folder with --tokenizer")
    _check_prefix(file)
    try:
        backend: Backend = Backend.from_file(str(file))
    except BaseException as error:  # the library raises bare Exception, and panics
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise ModelFileBroken(file, f"not a tokenizer: {one_line(error)}") from None
    backend.no_truncation()
    backend.no_padding()
    _add_tokens(backend, file.parent)
    return backend


def _check_prefix(file: Path) -> None:
    """Refuse merges that the library would cut within a character: it ends the process on some of them.

    Raises:
        ModelFileBroken: a merge has a second part without the prefix that continuing parts have.
    """
    try:
        content = file.read_bytes()
        model: Any = json.loads(content).get("model") if _PREFIX.search(content) else None
        prefix, merges = model["continuing_subword_prefix"], model["merges"]
        parts = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
        wrong = [part for part in parts if not part[1].startswith(prefix)]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError):
        return  # there is no prefix, or no merges, or the library says what is wrong
    if wrong or (parts and not prefix.isascii()):
        raise ModelFileBroken(
            file, f"not a tokenizer: not all merges have the prefix {prefix!r:.40} of continuing parts"
        )


def without_special_tokens(backend: Backend) -> Backend:
    """Return a copy that encodes special tokens in a text as text."""
    copy: Backend = Backend.from_str(backend.to_str())
    copy.encode_special_tokens = True
    return copy


def _add_tokens(backend: Backend, folder: Path) -> None:
    """Add the tokens of tokenizer_config.json, added_tokens.json and special_tokens_map.json."""
    files = [folder / f"{name}.json" for name in ("tokenizer_config", "added_tokens", "special_tokens_map")]
    config, added, special = (_read_object(file) for file in files)
    if DECODER in config:  # then the older files beside it do not count for transformers
        added, special = {}, {}
    _check_lists(files[0], config)
    _check_lists(files[2], special)
    named = _special_tokens(tokenizer_settings(config, special))
    wanted: dict[int, AddedToken] = {}
    try:
        for number, entry in (config.get(DECODER) or {}).items():
            wanted[int(number)] = _added_token(entry, named)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelFileBroken(files[0], "its added_tokens_decoder is not readable") from None
    texts = {token.content for token in wanted.values()}
    for text, number in added.items():
        if text not in texts and isinstance(number, int):
            wanted.setdefault(number, AddedToken(text, special=text in named, normalized=text not in named))
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(wanted.items()) if repr(present.get(token.content)) != repr(token)]
    known = {*present, *(token.content for token in new)}
    new += [token for text, token in named.items() if text not in known]
    if new:
        backend.add_tokens(new)
    for number, token in wanted.items():
        if (found := backend.token_to_id(token.content)) != number:
            log.warning(
                "a token has another id than its file says", token=token.content, said=number, id=found
            )


def _added_token(entry: Any, named: Container[str] = ()) -> AddedToken:
    flags = {name: bool(entry[name]) for name in _FLAGS if name in entry}
    special = bool(entry.get("special", False)) or entry["content"] in named
    return AddedToken(entry["content"], special=special, **flags)


def _check_lists(file: Path, content: Mapping[str, Any]) -> None:
    """Raise `ModelFileBroken` if special tokens are not listed in one of the forms that there are."""
    for key in (EXTRA, OLDER_EXTRA):
        if not isinstance(content.get(key) or [], list | dict):
            raise ModelFileBroken(file, f"{key!r} must be a list of tokens, is {content[key]!s:.40}")


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Return text → token of all special tokens that a folder names, in the order of their ids."""
    extra = settings.get(EXTRA) or []
    found: dict[str, AddedToken] = {}
    for token in (*named_tokens(settings).values(), *(extra if isinstance(extra, list) else ())):
        if text := token_text(token):
            flags = {"normalized": False} | (token if isinstance(token, dict) else {})
            found.setdefault(text, _added_token({**flags, "content": text, "special": True}))
    return found


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ModelFileBroken(file, f"has {size} bytes; at most {MAX_BYTES} are read")
        text = file.read_text("utf-8")
        content = json.loads(text)
        if _HALF.search(text):  # perhaps; the names of tokens would otherwise be refused one by one
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ModelFileBroken(file, "has half a surrogate pair, which is not valid Unicode") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileBroken(file, f"cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def special_token_ids(backend: Backend) -> frozenset[int]:
    """Return the ids of tokens that never stand for text."""
    return frozenset(
        token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
    )
