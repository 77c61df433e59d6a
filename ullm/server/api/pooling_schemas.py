"""Embeddings, scores and rankings: requests, answers, and the effect of each request field."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ullm.server.api.field_rules import FieldRule, honoured, ignored, own, refused, vllm_refused
from ullm.server.api.schemas import Int


class EmbeddingsRequest(msgspec.Struct, kw_only=True):
    """``POST /v1/embeddings``.

    Args:
        input: a text, token ids, or a list of either for several prompts.
        pooling: default: ``--pooling``.
        normalize: of length 1; true by default.
        truncate_prompt_tokens: keep this many tokens of each prompt, the last ones; -1: as many as fit.
        truncation_side: ``left`` (the default) drops the first ones, ``right`` the last ones.
    """

    input: str | list[str | Int | list[Int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Int | None = None


class ScoreRequest(msgspec.Struct, kw_only=True):
    """``POST /v1/score``: how well texts go together.

    Args:
        text_1: the text whose likelihood is the score, such as a question.
        text_2: the text that it is given, such as a document. One of them may be one text for all.
    """

    text_1: str | list[str]
    text_2: str | list[str]
    model: str | None = None
    priority: Int | None = None


class RerankDocument(msgspec.Struct, kw_only=True):
    """A document with a text."""

    text: str


class RerankRequest(msgspec.Struct, kw_only=True):
    """``POST /v1/rerank``: documents, the best for a query first.

    Args:
        top_n: the best ones only.
        return_documents: the answer has their texts; true by default.
    """

    query: str
    documents: list[str | RerankDocument]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None
    priority: Int | None = None


class PromptUsage(msgspec.Struct, kw_only=True):
    """Tokens of the prompts."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, kw_only=True):
    """The vector of one prompt: numbers, or base64 of float32 with the lowest byte first."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Embeddings(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/embeddings``."""

    model: str
    data: list[Embedding]
    usage: PromptUsage
    object: Literal["list"] = "list"


class Score(msgspec.Struct, kw_only=True):
    """The score of one pair."""

    index: int
    score: float
    object: Literal["score"] = "score"


class Scores(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/score``."""

    id: str
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage
    object: Literal["list"] = "list"


class Ranked(msgspec.Struct, kw_only=True):
    """One document, and how well it fits the query."""

    index: int
    relevance_score: float
    document: RerankDocument | msgspec.UnsetType = msgspec.UNSET


class Ranking(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/rerank``, the best document first."""

    id: str
    model: str
    results: list[Ranked]
    usage: PromptUsage


_PRIORITY = own("priority", "lower values run first")
_MODEL = honoured("model", "must be the served name, if given")


EMBEDDING_FIELDS: tuple[FieldRule, ...] = (
    honoured("input", "a text, token ids, or a list of either; at most 2048"),
    _MODEL,
    honoured("encoding_format", "`float` or `base64`"),
    honoured("dimensions", "must be the model's own number, if given: vectors are not shortened"),
    ignored("user"),
    own("pooling", "`mean` or `last`; default: `--pooling`"),
    own("normalize", "of length 1; true by default"),
    own("add_special_tokens", "put the tokenizer's special tokens around a text; true by default"),
    own("truncate_prompt_tokens", "keep the last tokens of each prompt; -1: as many as fit"),
    own("truncation_side", "`left` drops the first tokens, `right` the last ones"),
    _PRIORITY,
    vllm_refused("messages", "see `input`; a conversation's tokens come from `/tokenize`"),
    vllm_refused("chat_template", "see `input`"),
    vllm_refused("embed_dtype", "see `encoding_format`", "float32"),
    vllm_refused("endianness", "see `encoding_format`", "little", "native"),
    vllm_refused("use_activation", "see `normalize`", True),
)
"""Every request field of embeddings."""

SCORE_FIELDS: tuple[FieldRule, ...] = (
    own("text_1", "the text whose likelihood is the score, or a list"),
    own("text_2", "the text that it is given, or a list; one of them may be one text for all"),
    _MODEL,
    _PRIORITY,
    vllm_refused("truncate_prompt_tokens", "shorten the texts"),
)
"""Every request field of scores."""

RERANK_FIELDS: tuple[FieldRule, ...] = (
    own("query", "the text that is looked for"),
    own("documents", "texts, or objects with a `text`"),
    _MODEL,
    own("top_n", "the best ones only"),
    own("return_documents", "answer with their texts; true by default"),
    _PRIORITY,
    refused("max_chunks_per_doc", "documents are not split"),
    refused("rank_fields", "documents have a `text`"),
    vllm_refused("truncate_prompt_tokens", "shorten the texts"),
    vllm_refused("max_tokens_per_doc", "shorten the texts", 0),
)
"""Every request field of rankings."""
