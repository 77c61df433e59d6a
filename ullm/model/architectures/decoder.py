"""The decoder-only transformer that Llama, Qwen2 and Qwen3 share.

Modules are named as in the checkpoints, so that names need no translation. ``forward`` of submodules is
called directly: hooks are not used, and with one row a step consists of small costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ullm.errors import ModelUnsupported
from ullm.model.attention.batch import Batch
from ullm.model.kernels.cpu.kernels import LANES, CpuKernels, weight_formats
from ullm.model.kernels.cpu.ops import KernelOps
from ullm.model.kernels.cuda.ops import choose_ops
from ullm.model.layers.layer_ops import LayerOps, StepOps, TorchOps
from ullm.model.layers.linear import (
    ColumnParallelLinear,
    Loadable,
    ParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    use_quantized_weight,
)
from ullm.model.layers.linear_kernels import LinearKernel, choose_linear_kernel
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.quantization import Bits, Scheme
from ullm.model.layers.rope import rope_cache
from ullm.model.memory.kv_pool import KvShape
from ullm.model.sampling.choose import SamplingFilter

PACKED = "packed"
"""Name of a module's packed weight in `Decoder.packed_weights`."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and variant of a decoder. Sizes are those of the whole model, not of one rank.

    Args:
        context_len: number of positions to prepare the rotary embedding for.
        rope: the checkpoint's ``rope_parameters``.
        sliding_windows: per layer, keys that a query sees; None: all.
        qk_norm: normalise queries and keys per head, before the rotation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    context_len: int
    rope: dict[str, Any]
    sliding_windows: tuple[int | None, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary embeddings over the paged KV cache."""

    def __init__(self, config: DecoderConfig, layer: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.scale, self.window = config.head_dim**-0.5, config.sliding_windows[layer]
        self.num_heads, self.num_kv_heads, first_kv = split_heads(config, parallel)
        d = config.head_dim
        kv = (config.num_kv_heads * d, first_kv * d, self.num_kv_heads * d)
        q = (config.num_heads * d, parallel.rank * self.num_heads * d, self.num_heads * d)
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, parts, config.qkv_bias)
        self.o_proj = RowParallelLinear(
            config.num_heads * d, config.hidden_size, config.output_bias, parallel
        )
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, step: StepOps) -> Tensor:
        """Compute ``[T, hidden_size]`` → ``[T, hidden_size]``."""
        return self.o_proj.forward(step.attend(self, self.qkv_proj.forward(x)))


class GatedMLP(nn.Module):
    """The MLP ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, parallel: ParallelContext) -> None:
        super().__init__()
        total = config.intermediate_size
        count = parallel.share(total, "hidden units of each MLP")
        part = (total, parallel.rank * count, count)
        parts = {"gate_proj": part, "up_proj": part}
        self.gate_up_proj = ColumnParallelLinear(config.hidden_size, parts, config.mlp_bias)
        self.down_proj = RowParallelLinear(total, config.hidden_size, config.mlp_bias, parallel)

    def forward(self, x: Tensor, step: StepOps) -> Tensor:
        """Compute ``[T, hidden_size]`` → ``[T, hidden_size]``."""
        return self.down_proj.forward(step.silu_and_mul(self.gate_up_proj.forward(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, config: DecoderConfig, layer: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.world_size = parallel.world_size
        self.self_attn = DecoderAttention(config, layer, parallel)
        self.mlp = GatedMLP(config, parallel)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, delta: Tensor | None, step: StepOps) -> Tensor:
        """Add ``delta``, the previous layer's MLP output, and the attention's output to the residual stream
        ``x [T, hidden_size]`` in place; return the MLP's output, which the next layer adds."""
        delta = self.self_attn.forward(step.add_norm(x, delta, self.input_layernorm), step)
        return self.mlp.forward(step.add_norm(x, delta, self.post_attention_layernorm), step)


class DecoderStack(nn.Module):
    """Embedding, layers and final norm, which checkpoints name ``model.``."""

    def __init__(self, config: DecoderConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel)
        self.layers = nn.ModuleList(DecoderLayer(config, i, parallel) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model; implements `ullm.model.attention.batch.CausalModel`.

    Subclasses only read their own config.json.

    Raises:
        ModelUnsupported: the sizes are not divisible by the number of ranks.
    """

    ops: LayerOps

    def __init__(self, config: DecoderConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, _ = split_heads(config, parallel)
        self.kv_shape = KvShape(config.num_layers, kv_heads, config.head_dim, heads)
        self.model = DecoderStack(config, parallel)
        self.lm_head = VocabParallelHead(config.vocab_size, config.hidden_size, parallel)
        if config.tie_word_embeddings:
            self.lm_head.weight = None
        self._layers = [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]
        self._num_parameters = self._count()
        self._dtype = self._residual_dtype = torch.get_default_dtype()

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """Convert the content of a config.json.

        Raises:
            KeyError: a key is missing.
            ModelUnsupported: the config asks for something that the decoder cannot do.
        """
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic, and of KV."""
        return self._dtype

    def materialize(
        self, dtype: torch.dtype, device: torch.device, stored: Mapping[str, torch.dtype] | None = None
    ) -> None:
        """Allocate the parameters, uninitialised.

        Args:
            dtype: dtype of the arithmetic, and of all weights that ``stored`` does not name.
            stored: name of a module → dtype of its weights.
        """
        self._dtype = self._residual_dtype = dtype
        # Not by `to_empty`, which imports SymPy for tensors without memory, a quarter of a second.
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                kept = dtype if stored is None else stored.get(prefix, dtype)
                memory = torch.empty(parameter.shape, dtype=kept, device=device)
                setattr(module, name, nn.Parameter(memory, requires_grad=False))

    def quantize(self, scheme: Scheme) -> None:
        """Quantize all linear layers when they are loaded; call it before the weights are allocated.

        Only the CPU kernels can compute with the result. The embedding is not quantized, even if the head is
        tied to it.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.source = "model.embed_tokens"
        for _, module in self._packing():
            bits: Bits = 4 if scheme == "int4" and isinstance(module, ParallelLinear) else 8
            use_quantized_weight(module, bits, as_stored=scheme == "stored")

    @torch.no_grad()
    def prepare(self, device: torch.device, kernels: CpuKernels | None = None, *, fuse: bool = True) -> None:
        """Tie and pack the weights and choose the kernels; call it once, after loading.

        Args:
            device: where the weights are.
            kernels: compute the layers on a CPU instead of PyTorch.
            fuse: on CUDA, use fused kernels between the matrix products, if they work.
        """
        if self.config.tie_word_embeddings and self.lm_head.weight is None:
            self.lm_head.weight = self.model.embed_tokens.weight
        kernel = kernels or choose_linear_kernel(device, self._dtype)
        for _, module in self._packing():
            module.pack(kernel)
        self._bind(device, kernel, fuse=fuse)

    def packed_weights(self) -> dict[str, Tensor]:
        """Return all weights as `prepare` has left them, for `restore`."""
        plain = {name: parameter.data for name, parameter in self.named_parameters()}
        packed = {f"{name}.{PACKED}": module.packed for name, module in self._packing()}
        return plain | {name: tensor for name, tensor in packed.items() if tensor is not None}

    def tensors(self) -> Iterator[Tensor]:
        """See `CausalModel.tensors`."""
        yield from self.packed_weights().values()
        if isinstance(self.ops, TorchOps):
            yield from self.ops.tables

    def restore(self, weights: dict[str, Tensor], kernels: CpuKernels, dtype: torch.dtype) -> None:
        """Use weights that a model of the same shape and rank has prepared, instead of calling `prepare`."""
        self._dtype = dtype
        packing = dict(self._packing())
        for name, module in self.named_modules():
            if name in packing:
                packing[name].weight, packing[name].packed = None, weights[f"{name}.{PACKED}"]
            for key, _ in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(weights[f"{name}.{key}"], requires_grad=False))
        self._bind(torch.device("cpu"), kernels)

    def _packing(self) -> Iterator[tuple[str, ParallelLinear | VocabParallelHead]]:
        """Iterate over the modules whose weights are packed, with their names."""
        for name, module in self.named_modules():
            if isinstance(module, ParallelLinear | VocabParallelHead):
                yield name, module

    def _bind(self, device: torch.device, kernel: LinearKernel, *, fuse: bool = False) -> None:
        """Bind the packed weights to ``kernel`` and choose the layers' operations."""
        if self.config.tie_word_embeddings and device.type == "cpu" and not isinstance(kernel, CpuKernels):
            # Logits in float32 need no sharpening; on CUDA it would cost more than it is worth.
            embedding = self.model.embed_tokens.table()
            self.lm_head.table = embedding if self._dtype != torch.float32 else None
        for _, module in self._packing():
            module.bind(kernel)
        cos, sin = rope_cache(self.config.rope, self.config.head_dim, self.config.context_len)
        # Sums over many layers lose the most in bfloat16, and float32 costs nothing on CPUs.
        self._residual_dtype = torch.float32 if device.type == "cpu" else self._dtype
        if isinstance(kernel, CpuKernels):
            self.ops = KernelOps(kernel, cos, sin)
            return
        tables = cos.to(device, self._dtype), sin.to(device, self._dtype)
        if fuse and device.type == "cuda" and self._dtype != torch.float32:
            first = self._layers[0]
            self.ops = choose_ops(
                *tables, first.self_attn, self.config.hidden_size, first.mlp.down_proj.local
            )
        else:
            self.ops = TorchOps(*tables)

    def suits_kernels(self) -> bool:
        """Return True if the CPU kernels can compute this rank's share: they work on vectors of sixteen."""
        sizes = (self.config.hidden_size, self.config.head_dim, self._layers[0].mlp.down_proj.local)
        return not any(size % LANES for size in sizes)

    def forward(self, token_ids: Tensor, batch: Batch) -> Tensor:
        """Compute ``[T]`` token ids → ``[T, hidden_size]`` after the final norm."""
        x = self.model.embed_tokens.forward(token_ids).to(self._residual_dtype)
        step = self.ops.begin(batch)
        delta = step.layers(self._layers, x, batch.layer_done)
        return step.add_norm(x, delta, self.model.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute ``[rows, hidden_size]`` → ``[rows, vocab_size]``."""
        return self.lm_head.forward(hidden)

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """See `CausalModel.choose`."""
        return self.ops.choose(logits, filters, uniforms)

    def num_parameters(self) -> int:
        """Return the number of parameters of the whole model; tied weights count once."""
        return self._num_parameters

    def weight_bytes(self) -> int:
        """Return the bytes of this rank's weights; tied weights count once, unless the head is quantized."""
        packed = [(module, module.packed) for _, module in self._packing()]
        if any(tensor is not None and tensor.dtype == torch.uint8 for _, tensor in packed):
            return sum(tensor.nbytes for tensor in self.packed_weights().values())
        size = sum(parameter.nbytes for parameter in self.parameters())
        for module, tensor in packed:
            if tensor is not None and not (module is self.lm_head and self.config.tie_word_embeddings):
                size += module.shape[0] * module.shape[1] * tensor.dtype.itemsize
        return size

    def weight_formats(self) -> tuple[str, ...]:
        """See `CausalModel.weight_formats`."""
        weights = [module.packed for _, module in self._packing() if module.packed is not None]
        weights.append(self.model.embed_tokens.table())
        return tuple(sorted(set[str]().union(*map(weight_formats, weights))))

    def _count(self) -> int:
        """Return the number of parameters of the whole model."""
        whole: dict[str, int] = {}
        for name, module in self.named_modules():
            if isinstance(module, Loadable):
                whole |= {key: torch.Size(shard.full_shape).numel() for key, shard in module.shards(name)}
        return sum(whole.values())


def split_heads(config: DecoderConfig, parallel: ParallelContext) -> tuple[int, int, int]:
    """Return this rank's number of query heads and of KV heads, and its first KV head.

    With more ranks than KV heads, neighbouring ranks hold the same KV head.
    """
    heads = parallel.share(config.num_heads, "attention heads")
    if parallel.world_size % config.num_kv_heads == 0:
        return heads, 1, parallel.rank // (parallel.world_size // config.num_kv_heads)
    kv_heads = parallel.share(config.num_kv_heads, "KV heads")
    return heads, kv_heads, parallel.rank * kv_heads


def require_silu(hf: dict[str, Any]) -> None:
    """Check that the checkpoint uses the one activation that the shared MLP has.

    Raises:
        ModelUnsupported: it uses another one.
    """
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelUnsupported(f"hidden_act {hf['hidden_act']!r} is not supported for this architecture")
