"""A loaded model compared with transformers' code on sixteen tokens, where that is cheap."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ullm.errors import ModelUnsupported, one_line
from ullm.machine import available_memory
from ullm.model.architectures.decoder import Decoder
from ullm.model.attention.batch import BatchLayout, CausalModel
from ullm.model.execution.pools import choose_gather
from ullm.model.loading.checkpoint import Checkpoint
from ullm.model.loading.finite import check_numbers

TOKENS = 16
PRIME = 7919
"""Token ids are its multiples, so that they are spread over the vocabulary."""
CHEAP = 2_000_000_000
"""Parameters up to which the comparison is made: transformers reads the weights a second time, in float32."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1, "int8": 0.15, "int4": 0.5}
"""Largest relative error of the median token's logits, by what weights or arithmetic are in: the coarsest
counts. Measured with tiny random models, whose errors are larger than those of trained ones."""


def verify(model: CausalModel, checkpoint: Checkpoint) -> str:
    """Compare a model with transformers' code; return what was found, in words.

    Raises:
        ModelUnsupported: the logits differ by more than roundings.
        ModelFileBroken: those of transformers are no numbers.
    """
    if (reason := why_not(model, checkpoint)) is not None:
        return f"not compared with transformers: {reason}"
    tokens = torch.arange(1, TOKENS + 1) * PRIME % model_vocabulary(model)
    try:
        expected = reference_logits(checkpoint, tokens)
    except Exception as error:  # whatever its code raises is no fault of ours
        return f"not compared with transformers: {type(error).__name__}: {one_line(error)}"
    check_numbers(expected, checkpoint.path, torch.float32)
    found = logits(model, tokens)
    check_numbers(found, checkpoint.path, model.dtype)
    distance = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
    most = max(TOLERANCES[name] for name in (*model.weight_formats(), dtype_name(model)))
    if not distance <= most:
        raise ModelUnsupported(
            f"{checkpoint.path}: computes something else than transformers (relative error {distance:.2g}, "
            f"at most {most:g} is rounding); please report it and try --no-cpu-kernels or --quantization none"
        )
    return f"equal to transformers on {TOKENS} tokens (relative error {distance:.1g})"


def why_not(model: CausalModel, checkpoint: Checkpoint) -> str | None:
    """Return why a model is not compared; None: it is."""
    if not isinstance(model, Decoder):
        return "it runs through its code, and was compared when it was loaded"
    if checkpoint.path.suffix == ".gguf":
        return "it is a GGUF file"
    if checkpoint.stored_format:
        return "its weights are quantized"
    count = model.num_parameters()
    if count > CHEAP:
        return f"it has {count / 1e9:.1f} billion parameters"
    if 4 * count > available_memory() // 2:
        return "there is too little memory for it twice"
    return None


def model_vocabulary(model: CausalModel) -> int:
    """Return the number of tokens of a native model."""
    assert isinstance(model, Decoder)
    return model.config.vocab_size


def dtype_name(model: CausalModel) -> str:
    """Return the name of the dtype of the arithmetic."""
    return str(model.dtype).removeprefix("torch.")


@torch.inference_mode()
def reference_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Return transformers' logits in float32, ``[tokens, vocab_size]``."""
    from transformers import AutoModelForCausalLM  # takes seconds

    from ullm.model.architectures.transformers_loading import quiet

    auto: Any = AutoModelForCausalLM
    with quiet():
        model = auto.from_pretrained(
            checkpoint.path, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    whole: Tensor = model.eval()(tokens[None], use_cache=False).logits[0]
    return whole


@torch.inference_mode()
def logits(model: CausalModel, tokens: Tensor) -> Tensor:
    """Return a model's logits in float32, on the CPU: a chunk, and single tokens."""
    device, count = next(iter(model.tensors())).device, len(tokens)
    backend = choose_gather(model)(model.kv_shape, 1, TOKENS, model.dtype, device)
    found = []
    for start, end in ((0, count - 2), (count - 2, count - 1), (count - 1, count)):
        layout = BatchLayout(
            token_ids=tokens[start:end].numpy(),
            positions=np.arange(start, end),
            query_lens=[end - start],
            seq_lens=[end],
            block_tables=np.zeros((1, 1), dtype=np.int32),
            slot_mapping=np.arange(start, end),
            num_decodes=int(end - start == 1),
        )
        batch = backend.prepare(layout)
        found.append(model.logits(model.forward(batch.token_ids, batch)))
    backend.release()
    return torch.cat(found).float().cpu()
