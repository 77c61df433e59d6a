"""Tiny GGUF files with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import quantize

HIDDEN, HEADS, KV_HEADS, LAYERS, FFN, VOCAB = 64, 4, 2, 2, 96, 40
SHAPES = {
    "attn_norm.weight": (HIDDEN,),
    "ffn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HIDDEN, HIDDEN),
    "attn_k.weight": (HIDDEN // 2, HIDDEN),
    "attn_v.weight": (HIDDEN // 2, HIDDEN),
    "attn_output.weight": (HIDDEN, HIDDEN),
    "ffn_gate.weight": (FFN, HIDDEN),
    "ffn_up.weight": (FFN, HIDDEN),
    "ffn_down.weight": (HIDDEN, FFN),
}
EXTRA_SHAPES = {
    "llama": {},
    "qwen2": {
        "attn_q.bias": (HIDDEN,),
        "attn_k.bias": (HIDDEN // 2,),
        "attn_v.bias": (HIDDEN // 2,),
    },
    "qwen3": {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)},
}


def block_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    blocks = {**SHAPES, **EXTRA_SHAPES[arch]}
    return {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in blocks.items()}


def start_file(path: Path, arch: str = "llama", **options: Any) -> GGUFWriter:
    writer = GGUFWriter(path, arch, **options)
    writer.add_name("tiny")  # transformers cannot read a file without one
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    if arch == "qwen3":
        writer.add_key_length(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list([f"t{index}" for index in range(VOCAB)])
    return writer


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(path: Path, arch: str = "llama", kind: Kind = Kind.F32, *, tied: bool = True) -> Path:
    random = np.random.default_rng(7)
    writer = start_file(path, arch)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,), **block_shapes(arch)}
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1 or kind == Kind.F32:
            writer.add_tensor(name, values)
        elif kind == Kind.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    finish(writer)
    return path
