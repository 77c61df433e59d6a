"""Check by a trial that a model of transformers computes the same with our attention as with its own.

Three short passes are run: with transformers' own attention; with a recording one, which observes each
layer's shape and mask; and with the tokens of two sequences in one row, as in a step's batch. A model with
other state than keys and values, with biases on its scores, with masks of its own, or that mixes neighbouring
tokens fails one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from ullm.errors import ModelUnsupported, one_line
from ullm.model.attention.batch import Batch, CausalModel
from ullm.model.loading.finite import check_numbers

RECORDING = "ullm_recording"
LENGTHS = (9, 6)
"""Numbers of tokens of the two sequences."""
TOLERANCE = {torch.float32: 1e-3}
ROUGH_TOLERANCE = 0.1
"""Largest relative error of a text's median token. Rounding in half precision causes about 0.01, and may
route a token to another expert; a wrong computation is wrong for all tokens."""
LAYER_TYPES = frozenset(("attention", "full_attention", "sliding_attention"))
"""Layer types in transformers' configs that are plain causal attention."""


@dataclass(frozen=True, slots=True)
class LayerUse:
    """How one layer uses attention.

    Args:
        num_query_heads: number of query heads.
        num_kv_heads: number of KV heads.
        head_dim: size of queries, keys and values.
        sliding_window: keys that a query sees, itself included; None: all.
    """

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None


@dataclass(frozen=True)
class ReferenceRun:
    """The results of a model with transformers' own attention.

    Args:
        name: name of its class.
        texts: token ids of a few sequences.
        logits: logits of all their tokens.
        layers: how each layer uses attention, in order.
    """

    name: str
    texts: list[Tensor]
    logits: Tensor
    layers: list[LayerUse]


def observe(model: Any) -> ReferenceRun:
    """Run an unmodified model with its own and with the recording attention.

    Raises:
        ModelUnsupported: the model does something that paged attention cannot do; says what.
    """
    name = type(model).__name__
    refuse_by_kind(model)
    with refusing(name):
        vocab_size = model.get_input_embeddings().weight.shape[0]
        texts = [
            torch.arange(1, length + 1, device=model.device) * 7919 * (seed + 1) % vocab_size
            for seed, length in enumerate(LENGTHS)
        ]
        model.set_attn_implementation("eager")
        logits = torch.cat([model(input_ids=text[None], use_cache=False).logits[0] for text in texts])
        return ReferenceRun(name, texts, logits, _record_layers(model, texts))


def refuse_by_kind(model: Any) -> None:
    """Refuse what can be told without the weights.

    Raises:
        ModelUnsupported: the model does something that paged attention cannot do; says what.
    """
    name = type(model).__name__
    if not model._supports_attention_backend:
        raise ModelUnsupported(f"{name}: its attention cannot be replaced by paged attention")
    if model._is_stateful or model.config.is_encoder_decoder:
        raise ModelUnsupported(f"{name} keeps state other than the keys and values of its tokens")
    text_config = model.config.get_text_config()
    unknown = {*(getattr(text_config, "layer_types", None) or ())} - LAYER_TYPES
    if unknown:
        raise ModelUnsupported(f"{name}: layers of type {', '.join(sorted(unknown))} are not supported")


def compare(model: CausalModel, reference: ReferenceRun) -> None:
    """Run all texts as one row of tokens, as in a step, with dense instead of paged attention.

    Raises:
        ModelUnsupported: the logits differ from the reference's.
        ModelFileBroken: the reference's are no numbers.
    """
    device, name = reference.logits.device, reference.name
    check_numbers(reference.logits, name, model.dtype)
    positions = torch.cat([torch.arange(len(text), device=device) for text in reference.texts])
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    owner = torch.repeat_interleave(
        torch.arange(len(LENGTHS), device=device), torch.tensor(LENGTHS, device=device)
    )
    visible = (owner[:, None] == owner) & (positions[:, None] >= positions)
    batch = Batch(
        token_ids=torch.cat(reference.texts),
        positions=positions,
        query_start=nothing,
        seq_lens=nothing,
        block_tables=nothing,
        slot_mapping=nothing,
        query_lens_host=LENGTHS,
        seq_lens_host=LENGTHS,
        num_decodes=0,
        attention=lambda _layer, *qkv_scale_window_softcap: _dense(visible, *qkv_scale_window_softcap),
    )
    with refusing(name):
        logits = model.logits(model.forward(batch.token_ids, batch)).float()
        expected = reference.logits.float()
        errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        error = max(float(part.median()) for part in errors.split(LENGTHS))
    if not error <= TOLERANCE.get(model.dtype, ROUGH_TOLERANCE):
        raise ModelUnsupported(
            f"{name} computes something else with paged attention (relative error {error:.2g}): "
            "it cannot be run"
        )


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn any error of a model's code into a ModelUnsupported of one line."""
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError:
        raise
    except ModelUnsupported as error:
        raise ModelUnsupported(str(error) if name in str(error) else f"{name}: {error}") from error
    except Exception as error:
        message = f"{name} does not run with paged attention: {type(error).__name__}: {one_line(error)}"
        raise ModelUnsupported(message) from error


def _record_layers(model: Any, texts: list[Tensor]) -> list[LayerUse]:
    transformers.AttentionInterface.register(RECORDING, _record)
    transformers.AttentionMaskInterface.register(RECORDING, _mark_mask)
    model.set_attn_implementation(RECORDING)
    recorder = LayerRecorder()
    for text in texts:
        positions = torch.arange(len(text), device=text.device)[None]
        model.base_model(
            input_ids=text[None], position_ids=positions, use_cache=False, ullm_recorder=recorder
        )
    return recorder.layers(type(model).__name__, len(texts), model.config.get_text_config().num_hidden_layers)


def _dense(
    visible: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention of ``[T, heads, D]`` under a mask ``[T, T]``."""
    groups = q.shape[1] // k.shape[1]
    k, v = (heads.repeat_interleave(groups, dim=1).transpose(0, 1).float() for heads in (k, v))
    scores = q.transpose(0, 1).float() @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if window is not None:
        visible = visible & torch.ones_like(visible).triu(1 - window)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(-1, len(q), 1)), -1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]]
    return (weights @ v).transpose(0, 1).to(q.dtype).contiguous()


class LayerRecorder:
    """Collects the calls of the recording attention."""

    def __init__(self) -> None:
        self._calls: dict[int, list[LayerUse]] = {}

    def add(self, layer: int, use: LayerUse) -> None:
        """Record one call of a layer."""
        self._calls.setdefault(layer, []).append(use)

    def layers(self, name: str, num_passes: int, num_layers: int) -> list[LayerUse]:
        """Return how each layer uses attention.

        Raises:
            ModelUnsupported: a layer does not attend exactly once per pass, or the layers' shapes differ.
        """
        if sorted(self._calls) != list(range(num_layers)):
            raise ModelUnsupported(f"{name}: only layers {sorted(self._calls)} of {num_layers} attend")
        if any(len(calls) != num_passes for calls in self._calls.values()):
            raise ModelUnsupported(f"{name} runs its layers more than once per token")
        uses = [self._calls[layer][0] for layer in range(num_layers)]
        most = max(use.num_kv_heads for use in uses)
        if len({use.num_query_heads for use in uses}) > 1 or any(most % use.num_kv_heads for use in uses):
            raise ModelUnsupported(f"{name}: its layers have different numbers of heads")
        return uses


def _record(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ullm_recorder: LayerRecorder | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute plain attention and record how the layer uses it."""
    name = type(module).__name__
    if ullm_recorder is None:
        raise ModelUnsupported(f"{name} does not pass keyword arguments on to its attention function")
    _refuse_extras(name, others)
    if attention_mask is None or attention_mask.numel() != 1:
        raise ModelUnsupported(f"{name} makes its attention mask itself")
    window = int(attention_mask) or None
    size = max(key.shape[-1], value.shape[-1])
    ullm_recorder.add(module.layer_idx, LayerUse(query.shape[1], key.shape[1], size, window))
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    visible = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril()
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _dense(visible, q, k, v, scale, window, softcap, s_aux)[None], None


def _refuse_extras(name: str, others: dict[str, Any]) -> None:
    """Refuse unknown tensor arguments, such as sinks or biases, which change what attention computes."""
    harmless = ("position_ids", "cache_position")
    extras = [key for key, value in others.items() if isinstance(value, Tensor) and key not in harmless]
    if extras:
        raise ModelUnsupported(f"{name} gives its attention {', '.join(extras)}, which is not supported")
    if others.get("is_causal") is False:
        raise ModelUnsupported(f"{name} is not causal")


def _mark_mask(
    *,
    mask_function: Callable[..., Any],
    device: torch.device,
    local_size: int | None = None,
    **_: Any,
) -> Tensor:
    """Return the mask's window (0: none) instead of a mask, for `transformers.AttentionMaskInterface`.

    The mask's own function is called at the window's edges, which reveals chunked or bidirectional masks.

    Raises:
        ModelUnsupported: the mask is neither causal nor causal with a sliding window.
    """
    edge = local_size or max(LENGTHS)
    points = torch.tensor(sorted({0, 1, edge - 1, edge, edge + 1, 2 * edge}), device=device)
    query, key = points[:, None], points[None, :]
    expected = key <= query
    if local_size is not None:
        expected = expected & (key > query - local_size)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    if not torch.equal(torch.as_tensor(mask_function(zero, zero, query, key)), expected):
        raise ModelUnsupported(
            "not a causal language model: its attention mask shows it later tokens, or is "
            "of a kind that is not supported"
        )
    return torch.full((1, 1, 1, 1), float(local_size or 0), device=device)
