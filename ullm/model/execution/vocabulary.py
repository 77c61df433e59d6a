"""What grammars need of a model's tokenizer, read in the worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ullm.grammars.matcher import MatcherFactory, Vocabulary
from ullm.model.sampling.constraints import Constraints
from ullm.protocol.messages import ModelInfo
from ullm.tokenization.backend import load_backend, special_token_ids
from ullm.tokenization.decoding import TokenBytes


def open_constraints(tokenizer_path: str, info: ModelInfo) -> Constraints:
    """Return the grammars of a rank, which reads the tokenizer in a thread of its own.

    Args:
        tokenizer_path: folder with tokenizer.json.
    """
    read: Callable[[], MatcherFactory] = partial(_read, Path(tokenizer_path) / "tokenizer.json", info)
    constraints = Constraints(read, info.vocab_size)
    constraints.prepare()
    return constraints


def _read(file: Path, info: ModelInfo) -> MatcherFactory:
    backend = load_backend(file)
    token_bytes = TokenBytes(backend)
    special = [token_id for token_id in special_token_ids(backend) if token_id < info.vocab_size]
    vocabulary = Vocabulary(
        [token_bytes[token_id] for token_id in range(info.vocab_size)],
        special,
        info.eos_token_ids,
        lambda text: list(backend.encode(text, add_special_tokens=False).ids),
    )
    return MatcherFactory(vocabulary, info.vocab_size)
