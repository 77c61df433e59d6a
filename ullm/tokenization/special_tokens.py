"""Which special tokens the files beside a tokenizer.json name, by transformers' rule.

tokenizer_config.json names them, each under a key of its own and further ones in a list. The older
special_tokens_map.json does so as well: it counts before the other, key by key, unless that has an
``added_tokens_decoder``; then it is not read at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys that all tokenizers have, in the order in which their tokens get ids."""
EXTRA, OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
"""Keys of the list; the second is the older name."""
SUFFIX = "_token"
"""The end of keys that name a token of one model only, such as ``image_token``."""
DECODER = "added_tokens_decoder"


def tokenizer_settings(config: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of tokenizer_config.json with what special_tokens_map.json says before it.

    A name without a token does not count, so that a tokenizer does not lose what its texts end with.
    """
    settings = _with_extra(config)
    if DECODER in config:
        return settings
    for key, value in special.items():
        if value is None:
            continue
        if key == EXTRA and isinstance(value, list) and isinstance(settings.get(key), list):
            value = [*settings[key], *(token for token in value if token not in settings[key])]
        settings[key] = value
    return _with_extra(settings)


def named_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return name → token, as it is written: a text, or an object with a ``content``."""
    own = {key: value for key, value in settings.items() if key.endswith(SUFFIX) and key not in NAMES}
    extra = settings.get(EXTRA)
    named = {name: settings.get(name) for name in NAMES} | own | (extra if isinstance(extra, dict) else {})
    return {name: token for name, token in named.items() if token_text(token)}


def token_text(token: object) -> str | None:
    """Return a special token's text; it is written as such, or as an object with a ``content``."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _with_extra(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give the list its newer name, unless there is one of that name."""
    settings = dict(config)
    if not settings.get(EXTRA) and (older := settings.pop(OLDER_EXTRA, None)) is not None:
        settings[EXTRA] = older
    return settings
