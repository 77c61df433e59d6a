"""Writing a model in each format, and asking it for a text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import quantize

from tests.benchmarks.perplexity.encoders import ENCODERS, encode
from tests.benchmarks.perplexity.results import FormatResult, FormatsReport
from tests.model.gguf_fixtures import finish
from tests.model.gguf_models import head_dim, tensors
from tests.model.model_fixtures import LogitsModel

WINDOW = 256
"""Tokens that are predicted from each other."""
BLOCK = 16
INSTEAD = {
    **dict.fromkeys((Kind.Q2_K, Kind.Q3_K, Kind.IQ4_XS), Kind.IQ4_NL),
    **{Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0},
}
"""What llama.cpp writes instead of a format whose blocks do not divide the rows of a matrix."""


def measure(path: Path, text: list[int], kinds: list[Kind], say: Callable[[str], None]) -> FormatsReport:
    """Measure each format.

    Args:
        path: a folder with a Llama model.
        text: the tokens; the first is only read.
        say: is given a line after each format.
    """
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = tensors("llama", reference)
    config = reference.config
    del reference
    unquantized, found = perplexity_of(path, "none", text), []
    say(f"unquantized: {unquantized:.3f}")
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            file, share = write(Path(folder) / "model.gguf", config, weights, kind)
            values = (perplexity_of(file, quantization, text) for quantization in ("none", "auto"))
            found.append(FormatResult(kind.name, share, *values))
        say(f"{kind.name}: {found[-1].dequantized:.3f} dequantized, {found[-1].kernels:.3f} with kernels")
    return FormatsReport(path.name, len(text) - 1, unquantized, found)


def write(
    path: Path, config: Any, weights: dict[str, npt.NDArray[np.float32]], kind: Kind
) -> tuple[Path, float]:
    """Write the model with its layers' matrices in a format and its table in Q8_0.

    Returns:
        The file, and the share of the layers' weights that have that format.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    writer.add_eos_token_id(2)
    counts = {True: 0, False: 0}
    for name, values in weights.items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        chosen = kind if name.startswith("blk.") else Kind.Q8_0
        if chosen in ENCODERS and values.shape[1] % ENCODERS[chosen][0]:
            chosen = INSTEAD[chosen]
        if name.startswith("blk."):
            counts[chosen is kind] += values.size
        encoded = encode(values, chosen) if chosen in ENCODERS else quantize(values, chosen)
        writer.add_tensor(name, encoded, raw_dtype=chosen)
    finish(writer)
    return path, counts[True] / sum(counts.values())


def perplexity_of(path: Path, quantization: str, text: list[int]) -> float:
    """Return the perplexity of a text; float32, and with ``none`` without kernels."""
    kernels = quantization != "none"
    options: dict[str, Any] = {"dtype": "float32", "cpu_kernels": kernels, "block_size": BLOCK}
    model, total = LogitsModel(path, quantization=quantization, **options), 0.0
    for start in range(0, len(text) - 1, WINDOW):
        window = text[start : start + WINDOW + 1]
        model.add(start, window[:-1], list(range(WINDOW // BLOCK)))
        logits = model.step((start, 0, len(window) - 1))[start].float()
        total += F.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum").item()
    return math.exp(total / (len(text) - 1))
