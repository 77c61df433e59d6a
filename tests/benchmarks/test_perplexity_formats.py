"""The formats that the perplexity benchmark writes are those that the gguf package reads."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from tests.benchmarks.perplexity.encoders import ENCODERS, encode

ERRORS = {
    Kind.Q2_K: 0.33,
    Kind.Q3_K: 0.2,
    Kind.Q4_K: 0.085,
    Kind.Q5_K: 0.042,
    Kind.Q6_K: 0.023,
    Kind.IQ4_NL: 0.09,
    Kind.IQ4_XS: 0.09,
}
"""Most root mean square error of normal weights, relative to theirs."""


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_what_is_written_is_read_back(kind: Kind) -> None:
    values = np.random.default_rng(5).standard_normal((8, 1024), dtype=np.float32)
    values[3] = 0.0
    values[4] += 3.0
    written = encode(values, kind)
    size, width = GGML_QUANT_SIZES[kind]
    assert written.shape == (8, 1024 // size * width)
    assert written.dtype == np.uint8
    found = dequantize(written, kind)
    assert not found[3].any()
    usual = [0, 1, 2, 5, 6, 7]
    error = np.sqrt(((found - values)[usual] ** 2).mean() / (values[usual] ** 2).mean())
    assert 0.2 * ERRORS[kind] < error < ERRORS[kind]


def test_rows_that_make_no_blocks() -> None:
    with pytest.raises(ValueError, match="Q4_K has blocks of 256, a row has 576 weights"):
        encode(np.zeros((1, 576), dtype=np.float32), Kind.Q4_K)
