"""Which metadata of a GGUF file are acted on, so that none is left unread by accident.

Those of the architecture itself are in `ullm.model.loading.gguf` and `gguf_kinds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ullm.errors import ModelUnsupported
from ullm.model.loading.gguf_file import GgufFile

NAMED_TEMPLATE = "tokenizer.chat_template."
"""Begins the keys of further templates, whose names ``tokenizer.chat_templates`` lists."""
READ = frozenset(
    {
        *("general.architecture", "general.alignment", "general.type"),
        *("split.no", "split.count", "split.tensors.count"),
        *(f"general.sampling.{name}" for name in ("temp", "top_k", "top_p", "min_p", "penalty_repeat")),
        *("tokenizer.chat_template", "tokenizer.chat_templates"),
        *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "scores", "merges")),
        *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding")),
        *(f"tokenizer.ggml.add_{name}" for name in ("bos_token", "eos_token", "space_prefix")),
    }
)
DESCRIPTIVE = (
    *("general.name", "general.basename", "general.finetune", "general.author", "general.version"),
    *("general.organization", "general.description", "general.quantized_by", "general.size_label"),
    *("general.license", "general.url", "general.doi", "general.uuid", "general.repo_url", "general.source"),
    *("general.base_model", "general.dataset", "general.tags", "general.languages", "general.datasets"),
    *("general.file_type", "general.quantization_version", "general.parameter_count", "quantize.imatrix"),
)
"""Keys, or what they begin with before a dot, that say where a file comes from and what its tensors are."""
WITHOUT_EFFECT = frozenset(
    {
        *(f"tokenizer.ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
        *(f"tokenizer.ggml.{name}_token_id" for name in ("prefix", "suffix", "middle", "mask", "cls")),
        *(f"tokenizer.ggml.{name}_token_id" for name in ("seperator", "separator")),
        *("tokenizer.ggml.token_type_count", "tokenizer.huggingface.json"),
        *("tokenizer.ggml.pretokenizer", "tokenizer.ggml.special_tokens"),
    }
)
"""Keys of other tasks than the generation of text, and of other readers."""
MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
    "tokenizer.ggml.precompiled_charsmap": ([],),
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.escape_whitespaces": (True,),
    "tokenizer.ggml.treat_whitespace_as_suffix": (False,),
}
"""Keys that would change how a text is split, and their values that change nothing."""


def check_type(file: GgufFile) -> None:
    """Refuse a GGUF file that is no model.

    Raises:
        ModelUnsupported: it is an adapter, an importance matrix, or a part of a model that sees; says so.
    """
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise ModelUnsupported(
            f"{file.path}: is of type {kind!r:.40} and no model; name the model's own file"
        )


def without_effect(metadata: Mapping[str, Any], of_architecture: Iterable[str]) -> list[str]:
    """Return the keys that have no effect here, and are not known to have none.

    Args:
        of_architecture: the keys of the architecture that are known.
    """
    known = READ | WITHOUT_EFFECT | frozenset(of_architecture)
    return sorted(
        key
        for key, value in metadata.items()
        if key not in known
        and not key.startswith(NAMED_TEMPLATE)
        and not any(key == name or key.startswith(f"{name}.") for name in DESCRIPTIVE)
        and value not in MUST_BE.get(key, ())
    )
