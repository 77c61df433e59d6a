"""Models of transformers, built and loaded by its own code: checked before and after, errors in one line."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ullm.config import ModelConfig
from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported, OutOfMemory, one_line
from ullm.machine import available_memory
from ullm.model.architectures.transformers_check import refuse_by_kind
from ullm.model.loading.sources import INDEX, SINGLE, iterate_sources
from ullm.model.loading.weights import HARMLESS, reject_codes, warn_of_unused
from ullm.model.memory.kv_pool import mib

if TYPE_CHECKING:
    from ullm.model.loading.checkpoint import Checkpoint

LARGEST_SHARE, SPARE_PARAMETERS = 4, 1 << 24
"""Parameters of a model: at most so many times those in its files, and some more. Tied ones count twice."""
NOT_SPLIT: Mapping[str, Any] = MappingProxyType({})
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change for all tokens of a batch when one of them is beyond some position."""


def read_hf_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """Return transformers' config object.

    Raises:
        ModelUnsupported: transformers does not know the architecture, or has no causal language model for it.
        ModelFileBroken: the config has values that transformers refuses.
    """
    name, path = checkpoint.architecture, checkpoint.path
    custom = "auto_map" in checkpoint.hf
    kind = checkpoint.hf.get("model_type")
    known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    if not known and not (custom and trust_remote_code):
        remedy = "; it comes with its own code: use --trust-remote-code if you trust it" if custom else ""
        raise ModelUnsupported(
            f"{path}: transformers {transformers.__version__} does not know {name}{remedy}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the config's checks may raise anything
        raise ModelFileBroken(path / "config.json", f"cannot be used: {explained(error)}") from error
    if known and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not custom:
        raise ModelUnsupported(f"{path}: {name} is not a causal language model")
    return config


def explained(error: Exception) -> str:
    """Return an error's first line, with the name of its class if that says more than its message."""
    plain = isinstance(error, ValueError | OSError | RuntimeError | ImportError)
    return one_line(error) if plain else f"{type(error).__name__}: {one_line(error)}"


def check_rope(hf_config: Any, checkpoint: Checkpoint) -> None:
    """Refuse context lengths at which one sequence's rotary embedding depends on another's length.

    Raises:
        ModelUnsupported: the context is too long; names the length that works.
    """
    text = hf_config.get_text_config()
    whole = getattr(text, "rope_parameters", None) or {}
    for parameters in (whole, *(part for part in whole.values() if isinstance(part, dict))):
        kind = parameters.get("rope_type")
        own = getattr(text, "max_position_embeddings", None) or checkpoint.context_len
        limit = parameters.get("original_max_position_embeddings") or own
        if kind in LENGTH_DEPENDENT_ROPE and checkpoint.context_len > limit:
            raise ModelUnsupported(
                f"{checkpoint.path}: {kind} rotary embeddings are supported up to the original context; "
                f"use --context-len {limit} or less"
            )


def stored_model(
    hf_config: Any, checkpoint: Checkpoint, trust_remote_code: bool, splitting: Mapping[str, Any] = NOT_SPLIT
) -> Any:
    """Return the model with its weights; raise `ModelError` if they are not all there, or of other shapes.

    Args:
        splitting: see `ullm.model.architectures.transformers_ranks.split_over`.
    """
    path = checkpoint.path
    if (path / SINGLE).exists() or (path / INDEX).exists():
        reject_codes(path)
        check_size(hf_config, checkpoint, trust_remote_code)
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    auto: Any = transformers.AutoModelForCausalLM
    if checkpoint.stored_format:
        source, auto = _dequantized(hf_config, checkpoint), _known_class(hf_config, checkpoint)
    try:
        loaded: Any = auto.from_pretrained(
            **source,
            config=hf_config,
            dtype=checkpoint.dtype,
            local_files_only=True,
            **({} if checkpoint.stored_format else {"trust_remote_code": trust_remote_code}),
            use_safetensors=True,  # a .bin is a pickle, whose loading may run code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **splitting,
        )
        model, info = loaded
    except OSError as error:
        if "no file named" in str(error):
            raise ModelNotFound(
                f"{path}: has no weights; a model folder must have model.safetensors"
            ) from error
        raise ModelFileBroken(path, one_line(error)) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged file or a custom class may raise anything
        raise ModelFileBroken(path, f"cannot be loaded: {explained(error)}") from error
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        detail = f"tensor {name!r} has shape {tuple(stored)}, the config says {tuple(wanted)}"
        raise ModelFileBroken(path, detail)
    if info["missing_keys"]:
        name, count = min(info["missing_keys"]), len(info["missing_keys"])
        raise ModelFileBroken(path, f"tensor {name!r} is missing ({count} in all)")
    warn_of_unused(path, [name for name in info["unexpected_keys"] if not HARMLESS.fullmatch(name)])
    return model


def empty_model(checkpoint: Checkpoint, config: ModelConfig) -> Any:
    """Return the model without memory for its weights.

    Raises:
        ModelUnsupported: it is known without them that paged attention cannot run it.
    """
    hf_config = read_hf_config(checkpoint, config.trust_remote_code)
    check_rope(hf_config, checkpoint)
    with quiet(), torch.device("meta"):
        model = random_model(hf_config, checkpoint, config.trust_remote_code)
    refuse_by_kind(model)
    return model


def _known_class(hf_config: Any, checkpoint: Checkpoint) -> Any:
    """Return the class of a model whose tensors are given to it.

    Raises:
        ModelUnsupported: it is not one of transformers' own.
    """
    if type(hf_config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelUnsupported(
            f"{checkpoint.path}: a model with its own code and weights in {checkpoint.stored_format} is not "
            "supported; use an unquantized checkpoint"
        )
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]


def _dequantized(hf_config: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the arguments that load the weights of a quantized checkpoint in the dtype of the arithmetic."""
    for name in ("quantization_config", "compression_config"):
        if hasattr(hf_config, name):
            delattr(hf_config, name)
    state = {}
    for name, tensor in iterate_sources(checkpoint.path, None, str):  # by their own names
        whole = tensor.read(0, 0, tensor.shape[0]) if tensor.shape else tensor.read(0, 0, 0)
        state[name] = whole.to(checkpoint.dtype) if whole.is_floating_point() else whole
    return {"pretrained_model_name_or_path": None, "state_dict": state}


def check_size(hf_config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Refuse a config of a much larger model than the files hold: transformers would make what they lack.

    Raises:
        ModelFileBroken: so it is; names both numbers of parameters.
        OutOfMemory: the weights do not fit into memory.
    """
    with quiet(), torch.device("meta"):
        model = random_model(hf_config, checkpoint, trust_remote_code)
    need = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(math.prod(each.shape) for _, each in iterate_sources(checkpoint.path, None, str))
    if need > LARGEST_SHARE * stored + SPARE_PARAMETERS:
        raise ModelFileBroken(
            checkpoint.path / "config.json",
            f"describes a model of {need} parameters, and the weights have {stored}; fetch the model again",
        )
    free = available_memory()
    if (size := sum(each.nbytes for each in (*model.parameters(), *model.buffers()))) > free:
        raise OutOfMemory(f"the weights need {mib(size)}, and {mib(free)} are free; use a smaller model")


def random_model(hf_config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """Return the model with random weights; raise `ModelError` if there is none of this config."""
    try:
        auto: Any = transformers.AutoModelForCausalLM
        with torch.random.fork_rng():  # the same weights each time
            torch.manual_seed(0)
            return auto.from_config(hf_config, dtype=checkpoint.dtype, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        raise ModelUnsupported(f"{checkpoint.path}: {one_line(error)}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever its code raises for this config
        raise ModelFileBroken(checkpoint.path, f"cannot be loaded: {explained(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and tables of tensors while loading; errors are raised anyway."""
    logging: Any = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
