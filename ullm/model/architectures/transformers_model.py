"""Causal language models of transformers, run by their own code on paged attention.

The model runs on the step's flattened tokens as one row. Its attention layers call ours, which is registered
with transformers and finds the `Batch` among the keyword arguments that models pass on. Nothing else in the
model may mix tokens. `transformers_check` tests that when the model is loaded, so that a model that does is
refused, not run wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from ullm.config import ModelConfig
from ullm.errors import ModelUnsupported
from ullm.logs import get_logger
from ullm.model.architectures.transformers_check import compare, observe
from ullm.model.architectures.transformers_keys import keys_without_effect
from ullm.model.architectures.transformers_loading import (
    check_rope,
    empty_model,
    quiet,
    random_model,
    read_hf_config,
    stored_model,
)
from ullm.model.architectures.transformers_ranks import check_plan, own_part, split_over
from ullm.model.attention.batch import Batch
from ullm.model.layers.linear_kernels import PlainKernel
from ullm.model.layers.lora import LoraHost, LoraLayer, Place
from ullm.model.memory.kv_pool import KvShape, common_window
from ullm.model.sampling.choose import SamplingFilter, choose_tokens

if TYPE_CHECKING:
    from ullm.model.loading.checkpoint import Checkpoint

log = get_logger(__name__)

PAGED_ATTENTION = "ullm_paged"


class TransformersModel:
    """A model of transformers; implements `ullm.model.attention.batch.CausalModel`.

    Args:
        model: a causal language model with its weights, on its device.
        is_split: whether it is this rank's part of the model.

    Raises:
        ModelUnsupported: the model does something that paged attention cannot do; says what.
    """

    def __init__(self, model: Any, *, is_split: bool = False) -> None:
        reference = observe(model)
        self._is_split = is_split
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
    def load(
        cls, checkpoint: Checkpoint, config: ModelConfig, device: torch.device, ranks: int = 1
    ) -> TransformersModel:
        """Load a checkpoint folder, in ``checkpoint.dtype``.

        Args:
            ranks: number of connected ranks that the model is split over, this one among them.

        Raises:
            ModelNotFound: the folder has no weights.
            ModelFileBroken: a file is damaged, or tensors are missing or have the wrong shape.
            ModelUnsupported: transformers does not know the architecture, or paged attention cannot run it.
        """
        hf_config = read_hf_config(checkpoint, config.trust_remote_code)
        check_rope(hf_config, checkpoint)
        if unread := keys_without_effect(checkpoint.hf, hf_config):
            file = checkpoint.path / "config.json"
            log.warning(f"{file}: keys that have no effect here: {', '.join(unread)}")
        with quiet(), split_over(ranks, device) as splitting:
            if splitting:
                check_plan(empty_model(checkpoint, config), checkpoint, config, device, ranks)
            if config.load_format == "dummy":
                model = random_model(hf_config, checkpoint, config.trust_remote_code)
            else:
                model = stored_model(hf_config, checkpoint, config.trust_remote_code, splitting)
        return cls(model.eval().requires_grad_(False).to(device), is_split=ranks > 1)

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
        """See `AdaptableModel.lora`. The head, and layers that see only some tokens, have no place.

        Raises:
            ModelUnsupported: the model is split over ranks.
        """
        if self._is_split:
            raise ModelUnsupported("a model that transformers splits over ranks takes no adapters")
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
            yield from map(own_part, module.parameters())
            yield from map(own_part, module.buffers())

    def num_parameters(self) -> int:
        """Return the number of parameters, of all ranks; tied weights count once."""
        return sum(parameter.numel() for parameter in self._parameters)

    def weight_bytes(self) -> int:
        """Return the bytes of the weights; tied weights count once."""
        return sum(own_part(parameter).nbytes for parameter in self._parameters)

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
