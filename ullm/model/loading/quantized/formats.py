"""Which format a checkpoint is in: what its config says, or the files that ModelOpt, GPTQ and AWQ add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ullm.errors import ModelFileBroken
from ullm.hub.files import read_json
from ullm.model.loading.quantized.awq import Awq
from ullm.model.loading.quantized.bitsandbytes import Bitsandbytes4
from ullm.model.loading.quantized.compressed import CompressedTensors
from ullm.model.loading.quantized.gptq import Gptq
from ullm.model.loading.quantized.interface import Format, FoundConfig
from ullm.model.loading.quantized.mxfp4 import Mxfp4
from ullm.model.loading.quantized.scaled import Scaled
from ullm.model.loading.quantized.torchao import Torchao

KEYS = ("quantization_config", "compression_config")
"""Keys of a config.json that say how its weights are quantized."""
FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files by which some programs say what their configs do not, and the method that they use."""


def find_format(path: Path, hf: Mapping[str, Any] | None = None) -> Format | None:
    """Return the format of a checkpoint's weights; None if they are not quantized.

    Args:
        hf: the content of its config.json; None: read it.

    Raises:
        ModelUnsupported: in a way that is not read here; names the method and the remedy.
        ModelFileBroken: the config cannot be read, or says what makes no sense.
    """
    if path.suffix == ".gguf":
        return None
    config = _find_config(path, read_json(path / "config.json", missing_ok=True) if hf is None else hf)
    if config is None:
        return None
    method = str(config.values.get("quant_method") or "unknown")
    make = FORMATS.get(method.lower())
    if make is None:
        raise config.unsupported(f"the weights are quantized ({method:.40}), which")
    return make(config)


def _find_config(path: Path, hf: Mapping[str, Any]) -> FoundConfig | None:
    for part in (hf, hf.get("text_config")):
        for key in KEYS:
            if isinstance(part, Mapping) and part.get(key):
                if not isinstance(part[key], Mapping):
                    raise ModelFileBroken(path / "config.json", f"{key!r} must be an object")
                values = part[key]
                if key == "compression_config" and "quant_method" not in values:
                    values = {**values, "quant_method": "compressed-tensors"}
                return FoundConfig(path / "config.json", values)
    if isinstance(hf.get("quantization"), Mapping):
        return FoundConfig(path / "config.json", {"quant_method": "by MLX"})
    for name, method in FILES.items():
        if (path / name).is_file():
            content = read_json(path / name)
            inner = content.get("quantization")
            values = inner if method == "modelopt" and isinstance(inner, Mapping) else content
            return FoundConfig(path / name, {"quant_method": method, **values})
    return None


def _modelopt(config: FoundConfig) -> Format:
    algorithm = str(config.values.get("quant_algo") or "unknown")
    if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):
        raise config.unsupported(f"ModelOpt with {algorithm:.40}")
    return Scaled("modelopt", config)


def _bitsandbytes(config: FoundConfig) -> Format:
    if config.values.get("load_in_8bit"):
        return Scaled("bitsandbytes", config)
    return Bitsandbytes4(config)


FORMATS: dict[str, Callable[[FoundConfig], Format]] = {
    "gptq": Gptq,
    "awq": Awq,
    "fp8": partial(Scaled, "fp8"),
    "modelopt": _modelopt,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": Mxfp4,
    "torchao": Torchao,
}
"""``quant_method`` of a config → what reads its weights."""
