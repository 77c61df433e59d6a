"""Models of known shapes with random weights: speed does not depend on the values of weights.

They are written without PyTorch, tensor by tensor, so that only the largest tensor must fit into memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ullm.errors import UsageError
from ullm.testing.models import tiny_tokenizer

if TYPE_CHECKING:
    import numpy
    import numpy.typing

SPREAD = 0.02
"""Standard deviation of the weights, as models are initialised."""
ROWS = 4096
"""Rows of a matrix that are drawn at once."""

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": SPREAD,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN3
    | {
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
    },
    "tiny": QWEN3
    | {
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
"""Name → config.json of the model; ``tiny`` is for trials."""

Tensors = dict[str, tuple[int, ...]]


def write_shape(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a folder with config.json, a small tokenizer and bfloat16 weights, unless it exists; return it.

    Args:
        name: a key of `SHAPES`.

    Raises:
        UsageError: unknown name.
    """
    if name not in SHAPES:
        raise UsageError(f"--shape {name}: expected one of {', '.join(SHAPES)}")
    config, weights = SHAPES[name], folder / "model.safetensors"
    if weights.is_file():
        return folder
    tiny_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    unfinished = weights.with_suffix(".part")
    with unfinished.open("wb") as file:
        write_weights(file, tensors_of(config), seed)
    unfinished.rename(weights)
    return folder


def tensors_of(config: dict[str, Any]) -> Tensors:
    """Return the names and shapes of a Qwen3's weights, tied ones once."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    tensors: Tensors = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    layer: Tensors = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_norm": (size,),
        "self_attn.k_norm": (size,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for index in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{index}.{part}.weight": shape for part, shape in layer.items()}
    return tensors | {"model.norm.weight": (hidden,)}


def write_weights(file: BinaryIO, tensors: Tensors, seed: int) -> None:
    """Write a safetensors file: length of the header, header, tensors one after the other; norms are 1."""
    import numpy

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(numpy.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    source = numpy.random.default_rng(seed)
    for shape in tensors.values():
        for part in _random(shape, source):
            file.write(_bfloat16(part))


def _random(
    shape: tuple[int, ...], source: numpy.random.Generator
) -> Iterator[numpy.typing.NDArray[numpy.float32]]:
    import numpy

    if len(shape) == 1:
        yield numpy.ones(shape, numpy.float32)
        return
    for first in range(0, shape[0], ROWS):
        count = min(ROWS, shape[0] - first)
        yield source.standard_normal((count, *shape[1:]), numpy.float32) * numpy.float32(SPREAD)


def _bfloat16(values: numpy.typing.NDArray[numpy.float32]) -> bytes:
    """Return the upper halves of the numbers; rounding would not make random numbers more random."""
    import numpy

    return (values.view(numpy.uint32) >> 16).astype("<u2").tobytes()
