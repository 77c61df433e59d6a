"""What keys and values depend on besides tokens, as a digest: only of equal ones may blocks change places."""

from __future__ import annotations

import dataclasses
import json
import os
from hashlib import blake2b
from pathlib import Path

import torch

from ullm.config import EngineConfig, ModelConfig
from ullm.errors import ModelError
from ullm.model.architectures.decoder import Decoder
from ullm.model.attention.batch import AttentionBackend, CausalModel
from ullm.model.layers.layer_ops import TorchOps
from ullm.model.loading.checkpoint import Checkpoint
from ullm.model.loading.sources import weight_files

NOT_IN_KV = frozenset(
    {
        *("model", "revision", "tokenizer", "served_model_name", "chat_template", "special_tokens_in_text"),
        *("generation_config", "verify", "lora"),
    }
)
"""Options of a model that keys and values do not depend on, or whose part in them is said otherwise."""


def weights_fingerprint(path: Path) -> str:
    """Return a digest of which files the weights are in; empty if their status cannot be read.

    Files are known by path, size and time of change, as they are for packed weights.
    """
    try:
        files = [Path(os.path.realpath(file)) for file in weight_files(path)]
        known = [
            [str(file), status.st_size, status.st_mtime_ns] for file in files for status in [file.stat()]
        ]
    except (OSError, ModelError):
        return ""
    return _digest(known)


def kv_identity(
    checkpoint: Checkpoint,
    config: EngineConfig,
    fingerprint: str,
    model: CausalModel,
    backend: AttentionBackend,
    device: torch.device,
) -> str:
    """Return the digest of all that the pool's content depends on; empty if that is not known for certain.

    Args:
        fingerprint: of the weights' files before they were read.
    """
    if not fingerprint or fingerprint != weights_fingerprint(checkpoint.path):
        return ""  # written meanwhile: the weights may be of either version
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(ModelConfig)
        if field.name not in NOT_IN_KV
    }
    kernels = model.ops.name if isinstance(model, Decoder) else TorchOps.name
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    layout = [type(backend).__name__, backend.block_size, config.tp_size, config.pp_size]
    shape = dataclasses.astuple(model.kv_shape)
    made = [fingerprint, checkpoint.hf, options, str(model.dtype), model.weight_formats()]
    return _digest([made, kernels, where, layout, shape])


def _digest(value: object) -> str:
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
