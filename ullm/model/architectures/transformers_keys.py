"""Which keys of a config.json transformers' code acts on, so that none is left unread by accident.

Its configuration classes keep every key that they are given, and read some that they do not declare, such as
older names. So a key counts as read if the class declares it, or if it is named in the source of the class,
of those that it derives from, or of its models.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import transformers

from ullm.model.loading.config_keys import USED_ELSEWHERE, WITHOUT_EFFECT


def keys_without_effect(hf: Mapping[str, Any], config: Any) -> list[str]:
    """Return the keys that nothing reads and whose value is not empty; those of inner objects with a dot.

    Args:
        hf: the content of config.json.
        config: transformers' object made of it.
    """
    return sorted(_unread(hf, config, "", ""))


def _unread(hf: Mapping[str, Any], config: Any, models: str, prefix: str) -> Iterator[str]:
    kind = type(config)
    models += _model_source(kind)
    known = USED_ELSEWHERE | WITHOUT_EFFECT | _declared(kind)
    source = models + _class_source(kind)
    for key, value in hf.items():
        part = getattr(config, key, None) if isinstance(value, dict) else None
        if isinstance(part, transformers.PretrainedConfig):
            yield from _unread(value, part, models, f"{prefix}{key}.")
        elif key not in known and value not in (None, False, [], {}) and not _is_named(key, source):
            yield f"{prefix}{key}"


def _declared(kind: type) -> frozenset[str]:
    """Return the fields of a class and of those that it derives from, and other names of them."""
    fields = (name for each in kind.__mro__ for name in getattr(each, "__annotations__", {}))
    return frozenset((*fields, *(getattr(kind, "attribute_map", None) or {})))


def _class_source(kind: type) -> str:
    derived = [each for each in kind.__mro__ if each not in (object, transformers.PretrainedConfig)]
    return "\n".join(_source(each) for each in derived)


def _model_source(kind: type) -> str:
    """Return the source of the module of the causal language model that transformers has for a class."""
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if kind not in mapping:
        return _source(sys.modules.get(kind.__module__.replace("configuration_", "modeling_")))
    return _source(sys.modules.get(mapping[kind].__module__))


def _source(of: Any) -> str:
    try:
        return inspect.getsource(of) if of is not None else ""
    except (OSError, TypeError):  # without a file, as what is built in
        return ""


def _is_named(key: str, source: str) -> bool:
    """Return True if code names a key: as an attribute, or as a text."""
    name = re.escape(key)
    return re.search(rf"""\.{name}\b|(["']){name}\1""", source) is not None
