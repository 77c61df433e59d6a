"""The decoder-only transformer that the native architectures share.

Modules are named as in the checkpoints, so that names need no translation. ``forward`` of submodules is
called directly: hooks are not used, and with one row a step consists of small costs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ullm.errors import ModelUnsupported
from ullm.model.architectures.decoder_config import NORMS, DecoderConfig
from ullm.model.architectures.experts import Experts
from ullm.model.architectures.mlp import GatedMLP
from ullm.model.attention.batch import Batch
from ullm.model.kernels.cpu.kernels import LANES, CpuKernels, weight_formats
from ullm.model.kernels.cpu.ops import KernelOps
from ullm.model.kernels.cuda.ops import choose_ops
from ullm.model.layers.layer_ops import LayerOps, Norms, Rope, StepOps, TorchOps
from ullm.model.layers.linear import (
    ColumnParallelLinear,
    FusedColumnParallelLinear,
    Loadable,
    ParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
    use_quantized_weight,
)
from ullm.model.layers.linear_kernels import LinearKernel, choose_linear_kernel
from ullm.model.layers.lora import LoraHost, LoraLayer
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.quantization import Bits, Scheme
from ullm.model.layers.rope import rope_cache
from ullm.model.layers.split import HeadShare, runs, share_evenly, share_heads
from ullm.model.memory.kv_pool import KvShape, common_window
from ullm.model.sampling.choose import SamplingFilter

EMBEDDING = "model.embed_tokens"
"""Name of the embedding in checkpoints, which tied heads use as well."""
PACKED = "packed"
"""Name of a module's packed weight in `Decoder.packed_weights`."""


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary embeddings over the paged KV cache.

    Args:
        layer: index in the whole model.
    """

    def __init__(self, config: DecoderConfig, layer: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.layer, self.head_dim = layer - own_layers(config, parallel).start, config.head_dim
        """`layer` is the index in this rank's KV pool."""
        scale = config.attention_scale
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.window, self.softcap = config.sliding_windows[layer], config.attention_softcap
        self.rope, self.norm_all_heads = config.rope_of(layer), config.norm_all_heads
        share, d = split_heads(config, parallel), config.head_dim
        self.num_heads, self.num_kv_heads = len(share.heads), len(share.kv_heads)
        q, kv = runs(share.heads, d), runs(share.kv_heads, d)
        inputs, cached = config.num_heads * d, config.num_kv_heads * d
        parts = {"q_proj": (inputs, q), "k_proj": (cached, kv), "v_proj": (cached, kv)}
        kind = FusedColumnParallelLinear if config.fused else ColumnParallelLinear
        self.qkv_proj = kind(config.hidden_size, parts, config.qkv_bias)
        self.o_proj = RowParallelLinear(inputs, config.hidden_size, config.output_bias, parallel, q)
        sizes = (inputs, cached) if config.norm_all_heads else (d, d)
        norms = [make_norm(config, size) if config.qk_norm else None for size in sizes]
        self.q_norm, self.k_norm = norms
        if config.norm_all_heads and parallel.world_size > 1:
            raise ModelUnsupported(
                "its queries are normalised over all heads, which cannot be split; use --tp-size 1 "
                "(--pp-size splits the model)"
            )

    def forward(self, x: Tensor, step: StepOps) -> Tensor:
        """Compute ``[T, hidden_size]`` → ``[T, hidden_size]``."""
        return self.o_proj.forward(step.attend(self, self.qkv_proj.forward(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each with norms before or after it and a residual connection around it."""

    def __init__(self, config: DecoderConfig, layer: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.parallel = parallel
        self.self_attn = DecoderAttention(config, layer, parallel)
        experts = config.experts if config.has_experts(layer) else None
        self.mlp = GatedMLP(config, parallel) if experts is None else Experts(config, experts, parallel)
        self.is_dense, self.residual_scale = experts is None, config.residual_scale
        for name in NORMS[config.norms]:
            if name is not None:
                self.add_module(name, make_norm(config, config.hidden_size))
        self._norm_names = NORMS[config.norms]

    def forward(self, x: Tensor, delta: Tensor | None, step: StepOps) -> Tensor:
        """Add ``delta``, the previous layer's MLP output, and the attention's output to the residual stream
        ``x [T, hidden_size]`` in place; return the MLP's output, which the next layer adds."""
        before, attended, between, made = self.norms
        delta = self.self_attn.forward(step.add_norm(x, delta, before), step)
        delta = self.finish(delta, attended)
        return self.finish(self.mlp.forward(step.add_norm(x, delta, between), step), made)

    @property
    def norms(self) -> Norms:
        """The layer's norms."""
        first, second, third, fourth = self._norm_names
        return self._norm(first), self._norm(second), self._norm(third), self._norm(fourth)

    def _norm(self, name: str | None) -> RMSNorm | None:
        return None if name is None else getattr(self, name)

    def finish(self, delta: Tensor, norm: RMSNorm | None) -> Tensor:
        """Normalise and scale what attention or MLP return."""
        delta = delta if norm is None else norm.forward(delta)
        return delta if self.residual_scale == 1 else delta * self.residual_scale


class DecoderStack(nn.Module):
    """Embedding, layers and final norm, which checkpoints name ``model.``.

    The embedding is in the first stage only, and the final norm in the last one.
    """

    def __init__(self, config: DecoderConfig, parallel: ParallelContext) -> None:
        super().__init__()
        first, last = parallel.is_first_stage, parallel.is_last_stage
        size = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size, parallel) if first else None
        self.layers = nn.ModuleList()
        for index in own_layers(config, parallel):  # named by their index in the whole model
            self.layers.add_module(str(index), DecoderLayer(config, index, parallel))
        self.norm = make_norm(config, size) if last else None


class Decoder(nn.Module):
    """A causal language model; implements `ullm.model.attention.batch.CausalModel`.

    Subclasses only read their own config.json.

    With several stages, it is the part of one of them.

    Raises:
        ModelUnsupported: there are more ranks than heads, or more stages than layers.
    """

    ops: LayerOps

    def __init__(self, config: DecoderConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.config, self._parallel = config, parallel
        share, layers = split_heads(config, parallel), own_layers(config, parallel)
        self.kv_shape = KvShape(
            len(layers),
            len(share.kv_heads),
            config.head_dim,
            len(share.heads),
            common_window(config.sliding_windows),
        )
        self.model = DecoderStack(config, parallel)
        last = parallel.is_last_stage
        self.lm_head = VocabParallelHead(config.vocab_size, config.hidden_size, parallel) if last else None
        if config.tie_word_embeddings and self.lm_head is not None:
            self.lm_head.source = EMBEDDING
            if self.model.embed_tokens is not None:
                self.lm_head.weight = None
        self._layers = [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]
        self._num_parameters = self._count()
        self._dtype = self._residual_dtype = torch.get_default_dtype()
        self._kernel: LinearKernel | None = None
        self._lora: LoraHost | None = None

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
            if isinstance(module, VocabParallel):
                module.clear_padding()

    def quantize(self, scheme: Scheme, only: Collection[str] | None = None) -> None:
        """Quantize all linear layers when they are loaded; call it before the weights are allocated.

        Args:
            only: quantize the modules all of whose tensors are among these; None: all modules.

        Only the CPU kernels can compute with the result. The embedding is not quantized, even if the head is
        tied to it.
        """
        for name, module in self._packing():
            weights = {key for key, _ in module.shards(name) if key.endswith(".weight")}
            if only is not None and not weights <= set(only):
                continue
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
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.add_offset()
        head, embedding = self.lm_head, self.model.embed_tokens
        if head is not None and head.weight is None and embedding is not None:
            head.weight = embedding.weight
        kernel = kernels or choose_linear_kernel(device, self._dtype)
        if self._sharpens(device, kernel) and head is not None and isinstance(head.weight, nn.Parameter):
            head.table = head.weight.data
        for _, module in self._packing():
            module.pack(kernel)
        self._bind(device, kernel, fuse=fuse)

    def lora(self) -> LoraHost:
        """See `AdaptableModel.lora`."""
        if self._lora is None:
            assert self._kernel is not None, "prepare or restore comes first"
            device = next(self.parameters()).device
            self._lora = host = LoraHost(self._kernel, self._dtype, device)
            for name, module in self.named_modules():
                # An expert sees some rows of a step only, in an order of its own.
                if isinstance(module, ParallelLinear) and ".experts." not in name:
                    module.lora = LoraLayer(host)
                    host.places.update(module.lora_places(name, module.lora))
        return self._lora

    def packed_weights(self) -> dict[str, Tensor]:
        """Return all weights as `prepare` has left them, for `restore`."""
        plain = {name: parameter.data for name, parameter in self.named_parameters()}
        packed = {f"{name}.{PACKED}": module.packed for name, module in self._packing()}
        return plain | {name: tensor for name, tensor in packed.items() if tensor is not None}

    def tensors(self) -> Iterator[Tensor]:
        """See `CausalModel.tensors`."""
        yield from self.packed_weights().values()
        if isinstance(self.ops, TorchOps):
            for tables in self.ops.tables.values():
                yield from tables

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
        self._kernel = kernel
        for _, module in self._packing():
            module.bind(kernel)
        config = self.config
        ropes: dict[Rope, dict[str, Any]] = {"main": config.rope}
        if config.local_rope is not None:
            ropes["local"] = config.local_rope
        tables = {key: rope_cache(rope, config.head_dim, config.context_len) for key, rope in ropes.items()}
        # Sums over many layers lose the most in bfloat16, and float32 costs nothing on CPUs.
        self._residual_dtype = torch.float32 if device.type == "cpu" else self._dtype
        if isinstance(kernel, CpuKernels):
            self.ops = KernelOps(kernel, tables)
            return
        tables = {
            key: (cos.to(device, self._dtype), sin.to(device, self._dtype))
            for key, (cos, sin) in tables.items()
        }
        first = self._layers[0]
        if (
            fuse
            and device.type == "cuda"
            and self._dtype != torch.float32
            and config.fuses
            and isinstance(first.mlp, GatedMLP)
        ):
            self.ops = choose_ops(tables, first.self_attn, config.hidden_size, first.mlp.down_proj.local)
        else:
            self.ops = TorchOps(tables)

    def _sharpens(self, device: torch.device, kernel: LinearKernel) -> bool:
        """Return True if the head keeps its table, to compute the largest logits again.

        Logits in float32 need no sharpening; on CUDA it would cost more than it is worth.
        """
        on_cpu = device.type == "cpu" and not isinstance(kernel, CpuKernels)
        return self.config.tie_word_embeddings and on_cpu and self._dtype != torch.float32

    def suits_kernels(self) -> bool:
        """Return True if the CPU kernels can compute this rank's share: they work on vectors of sixteen."""
        inner = {module.local for module in self.modules() if isinstance(module, RowParallelLinear)}
        return not any(size % LANES for size in (self.config.hidden_size, self.config.head_dim, *inner))

    def forward(self, token_ids: Tensor, batch: Batch) -> Tensor:
        """Compute ``[T]`` token ids → ``[T, hidden_size]`` after the final norm.

        The first stage takes the tokens, others what the stage before sends; all but the last send theirs on.
        """
        if self._lora is not None:
            self._lora.groups = batch.adapters
        if self.model.embed_tokens is not None:
            x = self.model.embed_tokens.forward(token_ids).to(self._residual_dtype)
            if self.config.embedding_scale != 1:  # rounded as transformers does
                x *= float(torch.tensor(self.config.embedding_scale, dtype=self._dtype))
        else:
            size = (len(token_ids), self.config.hidden_size)
            x = torch.empty(size, dtype=self._residual_dtype, device=token_ids.device)
            self._parallel.receive(x)
        step = self.ops.begin(batch)
        delta = step.layers(self._layers, x, batch.layer_done)
        if self.model.norm is not None:
            return step.add_norm(x, delta, self.model.norm)
        x.add_(delta)
        self._parallel.send(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute ``[rows, hidden_size]`` → ``[rows, vocab_size]``; zeros in a stage without the head."""
        if self.lm_head is None:
            return hidden.new_zeros(()).expand(len(hidden), self.config.vocab_size)
        logits = self.lm_head.forward(hidden)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

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
        shared = self.config.tie_word_embeddings and self.model.embed_tokens is not None
        for module, tensor in packed:
            if tensor is not None and not (module is self.lm_head and shared):
                size += module.shape[0] * module.shape[1] * tensor.dtype.itemsize
        return size

    def weight_formats(self) -> tuple[str, ...]:
        """See `CausalModel.weight_formats`."""
        weights = [module.packed for _, module in self._packing() if module.packed is not None]
        if self.model.embed_tokens is not None:
            weights.append(self.model.embed_tokens.table())
        return tuple(sorted(set[str]().union(*map(weight_formats, weights))))

    def is_elsewhere(self, name: str) -> bool:
        """Return True if another stage has the place of a checkpoint's tensor."""
        first, _, rest = name.removeprefix("model.").partition(".")
        if first == "layers":
            index = rest.partition(".")[0]
            own = own_layers(self.config, self._parallel)
            return index.isdecimal() and int(index) < self.config.num_layers and int(index) not in own
        places = {"embed_tokens": self.model.embed_tokens, "norm": self.model.norm, "lm_head": self.lm_head}
        return first in places and places[first] is None

    def _count(self) -> int:
        """Return the number of parameters of the whole model: a layer's as often as there are such layers."""
        config = self.config
        tables = config.vocab_size * (1 if config.tie_word_embeddings else 2)
        total = (tables + 1) * config.hidden_size
        for has_experts in (False, True):
            alike = [layer for layer in range(config.num_layers) if config.has_experts(layer) is has_experts]
            if alike:
                own = [layer for layer in self._layers if layer.is_dense is not has_experts]
                one = own[0] if own else DecoderLayer(config, alike[0], self._parallel)
                total += len(alike) * count_parameters(one)
        return total


def make_norm(config: DecoderConfig, size: int) -> RMSNorm:
    """Return a norm over the last dimension of ``size``."""
    return RMSNorm(size, config.rms_norm_eps, config.norm_offset)


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters that a module has on all ranks together."""
    shapes = {
        key: torch.Size(shard.full_shape).numel()
        for name, part in module.named_modules()
        if isinstance(part, Loadable)
        for key, shard in part.shards(name)
    }
    return sum(shapes.values())


def own_layers(config: DecoderConfig, parallel: ParallelContext) -> range:
    """Return the layers of this rank's stage.

    Raises:
        ModelUnsupported: there are fewer layers than stages.
    """
    if config.num_layers < parallel.num_stages:
        raise ModelUnsupported(
            f"the model's {config.num_layers} layers cannot be split over --pp-size {parallel.num_stages}; "
            f"use a size of at most {config.num_layers}"
        )
    return share_evenly(config.num_layers, parallel.num_stages, parallel.stage)


def split_heads(config: DecoderConfig, parallel: ParallelContext) -> HeadShare:
    """Return this rank's heads.

    Raises:
        ModelUnsupported: there are fewer query heads than ranks.
    """
    return share_heads(config.num_heads, config.num_kv_heads, parallel.world_size)[parallel.rank]
