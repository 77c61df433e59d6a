"""Causal language models of transformers, run by their own code on paged attention.

The model runs on the step's flattened tokens as one row. Its attention layers call ours, which is registered
with transformers and finds the `Batch` among the keyword arguments that models pass on. Nothing else in the
model may mix tokens. `transformers_check` tests that when the model is loaded, so that a model that does is
refused, not run wrongly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from ullm.config import ModelConfig
from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported, one_line
from ullm.model.architectures.transformers_check import compare, observe
from ullm.model.attention.batch import Batch
from ullm.model.memory.kv_pool import KvShape
from ullm.model.sampling.choose import SamplingFilter, choose_tokens

if TYPE_CHECKING:
    from ullm.model.loading.checkpoint import Checkpoint

PAGED_ATTENTION = "ullm_paged"
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change for all tokens of a batch when one of them is beyond some position."""


class TransformersModel:
    """A model of transformers; implements `ullm.model.attention.batch.CausalModel`.

    Args:
        model: a causal language model with its weights, on its device.

    Raises:
        ModelUnsupported: the model does something that paged attention cannot do; says what.
    """

    def __init__(self, model: Any) -> None:
        reference = observe(model)
        transformers.AttentionInterface.register(PAGED_ATTENTION, paged_attention)
        model.set_attn_implementation(PAGED_ATTENTION)
        first = reference.layers[0]
        self.kv_shape = KvShape(
            len(reference.layers), first.num_kv_heads, first.head_dim, first.num_query_heads
        )
        self._windows = tuple(layer.sliding_window for layer in reference.layers)
        self._parameters = list(model.parameters())
        self._dtype = model.dtype
        self._head, self._body = model, model.base_model
        setattr(model, model.base_model_prefix, _GivenHidden())
        compare(self, reference)

    @classmethod
    def load(cls, checkpoint: Checkpoint, config: ModelConfig, device: torch.device) -> TransformersModel:
        """Load a checkpoint folder, in ``checkpoint.dtype``.

        Raises:
            ModelNotFound: the folder has no weights.
            ModelFileBroken: a file is damaged, or tensors are missing or have the wrong shape.
            ModelUnsupported: transformers does not know the architecture, or paged attention cannot run it.
        """
        hf_config = read_hf_config(checkpoint, config.trust_remote_code)
        check_rope(hf_config, checkpoint)
        with _quiet():
            if config.load_format == "dummy":
                model = _random_model(hf_config, checkpoint, config.trust_remote_code)
            else:
                model = _stored_model(hf_config, checkpoint, config.trust_remote_code)
        return cls(model.eval().requires_grad_(False).to(device))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, activations and KV."""
        dtype: torch.dtype = self._dtype
        return dtype

    def forward(self, token_ids: Tensor, batch: Batch) -> Tensor:
        """Compute ``[T]`` token ids → ``[T, hidden_size]`` after the final norm."""
        output = self._body(
            input_ids=token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            ullm_batch=batch,
            ullm_windows=self._windows,
        )
        hidden: Tensor = output[0][0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute ``[rows, hidden_size]`` → ``[rows, vocab_size]``, including the model's caps and scales."""
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """See `CausalModel.choose`."""
        return choose_tokens(logits, filters, uniforms)

    def tensors(self) -> Iterator[Tensor]:
        """See `CausalModel.tensors`."""
        for module in (self._body, self._head):
            yield from module.parameters()
            yield from module.buffers()

    def num_parameters(self) -> int:
        """Return the number of parameters; tied weights count once."""
        return sum(parameter.numel() for parameter in self._parameters)

    def weight_bytes(self) -> int:
        """Return the bytes of the weights; tied weights count once."""
        return sum(parameter.nbytes for parameter in self._parameters)

    def weight_formats(self) -> tuple[str, ...]:
        """See `CausalModel.weight_formats`."""
        return tuple(sorted({str(each.dtype).removeprefix("torch.") for each in self._parameters}))


class _GivenHidden(nn.Module):
    """Replaces a model's body for its head's code: returns the hidden states that it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        """Return ``inputs_embeds``, which are the final hidden states."""
        return _Output(inputs_embeds)

    def decoder(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        """Do the same for OPT, whose head calls this method."""
        return _Output(inputs_embeds)


class _Output:
    """A body's output; everything but the hidden states is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ullm_batch: Batch,
    ullm_windows: tuple[int | None, ...],
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute paged attention; an attention function for `transformers.AttentionInterface`.

    Its parameters are what transformers passes.

    Args:
        module: the attention layer, with its index in ``layer_idx``.
        query: ``[1, query heads, T, head_dim]``; ``key`` and ``value`` likewise.
        attention_mask: None, since transformers makes none for functions that it does not know.
        ullm_batch: the step's batch.
        ullm_windows: the sliding window of each layer.
    """
    layer: int = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = (heads[0].transpose(0, 1).contiguous() for heads in (query, key, value))
    attended = ullm_batch.attention(layer, q, k, v, scale, ullm_windows[layer], softcap)
    ullm_batch.layer_done()
    return attended[None], None


def read_hf_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """Return transformers' config object.

    Raises:
        ModelUnsupported: transformers does not know the architecture, or has no causal language model for it.
        ModelFileBroken: the config has values that transformers refuses.
    """
    name, path = checkpoint.architecture, checkpoint.path
    custom = "auto_map" in checkpoint.hf
    known = checkpoint.hf.get("model_type") in transformers.CONFIG_MAPPING
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
        raise ModelFileBroken(path / "config.json", f"cannot be used: {one_line(error)}") from error
    if known and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not custom:
        raise ModelUnsupported(f"{path}: {name} is not a causal language model")
    return config


def check_rope(hf_config: Any, checkpoint: Checkpoint) -> None:
    """Refuse context lengths at which one sequence's rotary embedding depends on another's length.

    Raises:
        ModelUnsupported: the context is too long; names the length that works.
    """
    text = hf_config.get_text_config()
    whole = getattr(text, "rope_parameters", None) or {}
    for parameters in (whole, *(part for part in whole.values() if isinstance(part, dict))):
        kind = parameters.get("rope_type")
        limit = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
        if kind in LENGTH_DEPENDENT_ROPE and checkpoint.context_len > limit:
            raise ModelUnsupported(
                f"{checkpoint.path}: {kind} rotary embeddings are supported up to the original context; "
                f"use --context-len {limit} or less"
            )


def _stored_model(hf_config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    path = checkpoint.path
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            config=hf_config,
            dtype=checkpoint.dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # a .bin is a pickle, whose loading may run code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
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
        raise ModelFileBroken(path, f"cannot be loaded: {one_line(error)}") from error
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        detail = f"tensor {name!r} has shape {tuple(stored)}, the config says {tuple(wanted)}"
        raise ModelFileBroken(path, detail)
    if info["missing_keys"]:
        name, count = min(info["missing_keys"]), len(info["missing_keys"])
        raise ModelFileBroken(path, f"tensor {name!r} is missing ({count} in all)")
    return model


def _random_model(hf_config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    try:
        auto: Any = transformers.AutoModelForCausalLM
        with torch.random.fork_rng():  # the same weights each time
            torch.manual_seed(0)
            return auto.from_config(hf_config, dtype=checkpoint.dtype, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        raise ModelUnsupported(f"{checkpoint.path}: {one_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
