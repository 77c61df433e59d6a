"""The results of the perplexity benchmark."""

from __future__ import annotations

import msgspec


class FormatResult(msgspec.Struct, frozen=True):
    """The perplexities of one format.

    Args:
        format: its name.
        weights: share of the layers' weights that have it; others have the one that llama.cpp takes instead.
        dequantized: of its float32 weights, with PyTorch's operations.
        kernels: as ullm reads the file by default.
    """

    format: str
    weights: float
    dequantized: float
    kernels: float


class FormatsReport(msgspec.Struct, frozen=True):
    """All results: of the model as it is, of it without kernels, and of each format."""

    model: str
    tokens: int
    unquantized: float
    formats: list[FormatResult]
