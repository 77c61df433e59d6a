"""Causal language models of transformers, run by their own code on paged attention.

The model runs on the step's flattened tokens as one row. Its attention layers call ours, which is registered
with transformers and finds the `Batch` among the keyword arguments that models pass on. Nothing else in the
model may mix tokens. `transformers_check` tests that when the model is loaded, so that a model that does is
refused, not run wrongly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from ullm.config import ModelConfig
from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported, one_line
from ullm.model.architectures.transformers_check import compare, observe, refuse_by_kind
from ullm.model.attention.batch import Batch
from ullm.model.layers.linear_kernels import PlainKernel
from ullm.model.layers.lora import LoraHost, LoraLayer, Place
from ullm.model.memory.kv_pool import KvShape, common_window
from ullm.model.sampling.choose import SamplingFilter, choose_tokens

if TYPE_CHECKING:
    from ullm.model.loading.checkpoint import Checkpoint
from ullm.model.loading.weights import INDEX, SINGLE, iterate_sources, reject_codes

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
        layers = reference.layers
        self.kv_shape = KvShape(  # layers with fewer or smaller heads are padded
            len(layers),
            max(layer.num_kv_heads for layer in layers),
            max(layer.head_dim for layer in layers),
            layers[0].num_query_heads,
            common_window(layer.sliding_window for layer in layers),
        )
        self._windows = tuple(layer.sliding_window for layer in reference.layers)
        self._parameters = list(model.parameters())
        self._dtype = model.dtype
        self._linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        self._lora: LoraHost | None = None
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
        with quiet():
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
        if self._lora is not None:
            self._lora.groups = batch.adapters
        output = self._body(
            input_ids=token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            ullm_batch=batch,
            ullm_windows=self._windows,
            ullm_shape=self.kv_shape,
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

    def lora(self) -> LoraHost:
        """See `AdaptableModel.lora`. The head, and layers that see only some tokens, have no place."""
        if self._lora is None:
            self._lora = host = LoraHost(PlainKernel(), self._dtype, self._parameters[0].device)
            head = self._head.get_output_embeddings()
            for name, linear in self._linears.items():
                if linear is not head and ".experts." not in name:
                    layer, outputs = LoraLayer(host), linear.out_features
                    linear.register_forward_hook(partial(_add_adapters, layer, host))
                    host.places[name] = Place(layer, linear.in_features, outputs, slice(0, outputs))
        return self._lora

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


def _add_adapters(
    layer: LoraLayer, host: LoraHost, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    """Add the step's adapters to a linear layer's outputs; a hook, called after the layer."""
    if host.groups:
        layer.add(inputs[0].reshape(-1, module.in_features), output.view(-1, module.out_features))


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
    ullm_shape: KvShape,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
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
        ullm_shape: shape of the keys and values in the pool, to which smaller ones are padded.
        s_aux: what transformers calls attention sinks, see `Attend`.
    """
    layer: int = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = (_padded(heads[0].transpose(0, 1), ullm_shape.head_dim) for heads in (query, key, value))
    if (copies := ullm_shape.num_kv_heads // k.shape[1]) > 1:
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    attended = ullm_batch.attention(layer, q, k, v, scale, ullm_windows[layer], softcap, s_aux)
    ullm_batch.layer_done()
    return attended[None, ..., : value.shape[-1]], None


def _padded(heads: Tensor, size: int) -> Tensor:
    """Return ``[T, heads, D]`` with zeros up to ``size``, which change no product; contiguous."""
    missing = size - heads.shape[-1]
    return nn.functional.pad(heads, (0, missing)) if missing else heads.contiguous()


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
        own = getattr(text, "max_position_embeddings", None) or checkpoint.context_len
        limit = parameters.get("original_max_position_embeddings") or own
        if kind in LENGTH_DEPENDENT_ROPE and checkpoint.context_len > limit:
            raise ModelUnsupported(
                f"{checkpoint.path}: {kind} rotary embeddings are supported up to the original context; "
                f"use --context-len {limit} or less"
            )


def _stored_model(hf_config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    path = checkpoint.path
    if (path / SINGLE).exists() or (path / INDEX).exists():
        reject_codes(path)
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


def empty_model(checkpoint: Checkpoint, config: ModelConfig) -> Any:
    """Return the model without memory for its weights.

    Raises:
        ModelUnsupported: it is known without them that paged attention cannot run it.
    """
    hf_config = read_hf_config(checkpoint, config.trust_remote_code)
    check_rope(hf_config, checkpoint)
    with quiet(), torch.device("meta"):
        model = _random_model(hf_config, checkpoint, config.trust_remote_code)
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


def _random_model(hf_config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    try:
        auto: Any = transformers.AutoModelForCausalLM
        with torch.random.fork_rng():  # the same weights each time
            torch.manual_seed(0)
            return auto.from_config(hf_config, dtype=checkpoint.dtype, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        raise ModelUnsupported(f"{checkpoint.path}: {one_line(error)}") from error


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
