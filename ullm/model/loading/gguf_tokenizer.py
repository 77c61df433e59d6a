"""A tokenizer.json from a GGUF file's metadata. Needs `tokenizers`, neither torch nor transformers.

Text is split as llama.cpp's src/llama-vocab.cpp does under the same names. The result tokenizes like the
model's original tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ullm.errors import ModelUnsupported
from ullm.model.loading.gguf_file import GgufFile
from ullm.model.loading.gguf_keys import NAMED_TEMPLATE

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""GGUF's types of tokens that are more than an entry in the vocabulary."""
SPACE = "▁"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3_SPLIT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2_SPLIT),
    "tekken": _TEKKEN_SPLIT,
}
_WHOLE_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
"""Pre-tokenizers with which a word in the vocabulary is one token, whatever its merges would yield."""
_ADDS_BOS = ("llama3", "llama-v3", "llama-bpe", "tekken")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_GPT2 = ("default", "gpt-2", "gpt2", "olmo", "phi-2", "jina-es", "jina-de", "gigachat", "roberta-bpe", "mpt")
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Key below ``general.sampling`` → key of a generation_config.json."""


def write_tokenizer(path: str | Path, folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json for a GGUF file.

    Args:
        path: the GGUF file.
        folder: the folder to write to; created if it does not exist.

    Raises:
        ModelNotFound: there is no such file.
        ModelFileBroken: the file is damaged or its vocabulary is inconsistent.
        ModelUnsupported: an unknown kind of tokenizer or text splitting.
    """
    file, folder = GgufFile(path), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(file).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(file))
    write_generation_config(path, folder)


def write_generation_config(path: str | Path, folder: str | Path) -> None:
    """Write generation_config.json for a GGUF file: special tokens, and the sampling that it recommends."""
    file = GgufFile(path)
    _write_json(Path(folder) / "generation_config.json", {**token_ids(file), **_sampling(file)})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def token_ids(file: GgufFile) -> dict[str, Any]:
    """Return ``bos_token_id``, ``eos_token_id`` (a list if there are several) and ``pad_token_id``."""
    ends = [_token_id(file, kind) for kind in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": _token_id(file, "bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": _token_id(file, "padding"),
    }


def _token_id(file: GgufFile, which: str) -> int | None:
    """Return the id of a special token; None if there is none, or one beyond the vocabulary, as -1 is."""
    key = f"tokenizer.ggml.{which}_token_id"
    token_id = file.metadata.get(key)
    if token_id is None:
        return None
    if isinstance(token_id, bool) or not isinstance(token_id, int):
        raise file.broken(f"the metadata's {key!r} is {token_id!r:.40}, not the id of a token")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    known = not isinstance(tokens, list) or 0 <= token_id < len(tokens)
    return token_id if known else None


def _tokens(file: GgufFile) -> list[str]:
    return _listed(file, "tokenizer.ggml.tokens", str)


def _listed(file: GgufFile, key: str, kind: Any) -> list[Any]:
    """Return a metadata value that must be a list of values of one kind."""
    values = file.require(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise file.broken(f"the metadata's {key!r} is not a list of {'texts' if kind is str else 'numbers'}")
    return values


def _sampling(file: GgufFile) -> dict[str, Any]:
    """Return the sampling parameters that the file recommends, under transformers' names."""
    values = {ours: file.metadata.get(f"general.sampling.{key}") for key, ours in _SAMPLING.items()}
    return {name: value for name, value in values.items() if value is not None}


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """Return the tokenizer that the metadata describe; raise what `write_tokenizer` raises."""
    kind = file.require("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise _unsupported(file, f"its tokenizer is {kind!r}; {' and '.join(builders)} can be read")
    try:
        tokenizer = builders[kind](file)
    except Exception as error:  # `tokenizers` raises a bare Exception for an inconsistent vocabulary
        if type(error) is not Exception:
            raise
        raise file.broken(f"the vocabulary is inconsistent: {error}") from error
    _add_special_tokens(tokenizer, file)
    _add_template(tokenizer, file)
    return tokenizer


def _unsupported(file: GgufFile, detail: str) -> ModelUnsupported:
    return ModelUnsupported(f"{file.path}: {detail}; name the model's original tokenizer with --tokenizer")


def _vocabulary(file: GgufFile) -> dict[str, int]:
    return {token: index for index, token in enumerate(_tokens(file))}


def _byte_level(file: GgufFile) -> Tokenizer:
    """Return a BPE tokenizer over bytes, like GPT-2's."""
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    merges = [_pair(file, merge) for merge in _listed(file, "tokenizer.ggml.merges", str)]
    tokenizer = Tokenizer(BPE(_vocabulary(file), merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", False))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)
    if pre in _SPLITS:
        steps = [pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"), bytes_only]
    elif pre in _SINGLE_DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), words]
    elif pre in _GPT2:
        steps = [words]
    else:
        raise _unsupported(file, f"text splitting {pre!r} is not known")
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(file: GgufFile, merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator:
        raise file.broken(f"the merge {merge!r} is not two tokens")
    return left, right


def _sentencepiece(file: GgufFile) -> Tokenizer:
    """Return a BPE tokenizer over characters with single bytes as a fallback, like Llama 2's."""
    vocabulary = _vocabulary(file)
    merges = (
        [_pair(file, merge) for merge in _listed(file, "tokenizer.ggml.merges", str)]
        if "tokenizer.ggml.merges" in file.metadata
        else _implied_merges(file, vocabulary)
    )
    unknown = _token_id(file, "unknown")
    unknown_token = None if unknown is None else _tokens(file)[unknown]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True))
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer


def _implied_merges(file: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return merges that make each token from two others, best scores first.

    SentencePiece merges the neighbours that yield the token with the best score. Listing every split of each
    token, in order of scores, is the same rule.
    """
    tokens, scores = _tokens(file), _listed(file, "tokenizer.ggml.scores", int | float)
    if len(tokens) != len(scores):
        raise file.broken(f"{len(tokens)} tokens but {len(scores)} scores")
    merges = [
        (score, token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: (-merge[0], vocabulary[merge[1]], vocabulary[merge[2]]))
    return [(left, right) for _, left, right in merges]


def _add_special_tokens(tokenizer: Tokenizer, file: GgufFile) -> None:
    tokens, key = _tokens(file), "tokenizer.ggml.token_type"
    types = _listed(file, key, int) if file.metadata.get(key) else [1] * len(tokens)
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=False) if token]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in marked
            if kind in (UNKNOWN, CONTROL)
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in marked if kind == USER_DEFINED]
    )


def _adds(file: GgufFile, which: str) -> bool:
    """Return True if encoding adds the bos or eos token; llama.cpp's default if the file does not say."""
    default = which == "bos" and (
        file.require("tokenizer.ggml.model") == "llama"
        or file.metadata.get("tokenizer.ggml.pre") in _ADDS_BOS
    )
    return bool(file.metadata.get(f"tokenizer.ggml.add_{which}_token", default))


def _add_template(tokenizer: Tokenizer, file: GgufFile) -> None:
    text, special = ["$A:0"], []
    for which in ("bos", "eos"):
        token_id = _token_id(file, which)
        if token_id is None or not _adds(file, which):
            continue
        token = _tokens(file)[token_id]
        text.insert(0 if which == "bos" else len(text), token)
        special.append((token, token_id))
    if special:
        pair = [*text, *(part.replace("$A:0", "$B:1") for part in text)]
        tokenizer.post_processor = processors.TemplateProcessing(text, pair, special)


def _templates(file: GgufFile) -> Any:
    """Return the template, or a list of named ones if there are several, as tokenizer_config.json has it."""
    default = file.metadata["tokenizer.chat_template"]
    names = [key for key in file.metadata if key.startswith(NAMED_TEMPLATE)]
    if not names:
        return default
    named = {"default": default} | {key.removeprefix(NAMED_TEMPLATE): file.metadata[key] for key in names}
    return [{"name": name, "template": text} for name, text in named.items()]


def _tokenizer_config(file: GgufFile) -> dict[str, Any]:
    tokens = _tokens(file)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds(file, "bos"),
        "add_eos_token": _adds(file, "eos"),
    }
    for name, which in _SPECIAL_TOKENS.items():
        token_id = _token_id(file, which)
        if token_id is not None:
            config[name] = tokens[token_id]
    if "tokenizer.chat_template" in file.metadata:
        config["chat_template"] = _templates(file)
    context = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    if context is not None:
        config["model_max_length"] = context
    return config
