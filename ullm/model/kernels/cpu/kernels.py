"""The compiled kernels as functions of tensors. The C++ files describe the computations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, Array, byref, c_float, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from ullm.machine import usable_cores
from ullm.model.kernels.cpu.build import open_library, variant
from ullm.model.kernels.cpu.exchange import SharedExchange
from ullm.model.layers.linear_kernels import Linear
from ullm.model.layers.quantization import QuantizedWeight, num_groups
from ullm.model.sampling.choose import SamplingFilter

LANES = 16
"""Floats of the widest vector in common.h; sizes must be multiples."""
COLUMNS = 64
"""Outputs of a linear layer that are packed together. As in linear.cpp."""
QUANTIZED_COLUMNS = 32
"""Outputs of a quantized linear layer that are packed together. As in quantized.cpp."""
ALIGNMENT = 64
"""Bytes of a vector."""
TILE_ROWS, AMX_TILE_ROWS = 12, 32
"""Query vectors that attention takes at once: twice what registers hold, or what two tiles of AMX hold."""
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
"""``Format`` of matrix.h, by the dtype of the packed weight; uint8 is a quantized one."""


class StepStruct(ctypes.Structure):
    """``Step`` of layer.h."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "num_tiles", "table_width", "block_size")),
        *((name, c_void_p) for name in ("positions", "slots", "tables", "tiles")),
    )


class LayerStruct(ctypes.Structure):
    """``Layer`` of layer.h."""

    _fields_ = (
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "rotary", "window", "norm_heads")),
        *((name, c_float) for name in ("scale", "norm_eps", "softcap")),
        *((name, c_void_p) for name in ("cosines", "sines", "q_norm", "k_norm")),
    )


class MatrixStruct(ctypes.Structure):
    """``Matrix`` of matrix.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("packed", "bias")),
        *((name, c_int64) for name in ("inputs", "outputs", "format")),
    )


def matrix_struct(packed: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> MatrixStruct:
    """Describe a packed weight; the caller keeps it, and the bias in float32, alive."""
    pointer = None if bias is None else bias.data_ptr()
    return MatrixStruct(packed.data_ptr(), pointer, in_features, out_features, FORMATS[packed.dtype])


class BlockStruct(ctypes.Structure):
    """``Block`` of layer.cpp."""

    _fields_ = (
        ("attention", LayerStruct),
        *((name, c_int64) for name in ("hidden", "intermediate", "gelu")),
        *((name, MatrixStruct) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "attended_norm", "mlp_norm", "made_norm")),
        *((name, c_float) for name in ("eps", "scale")),
    )


class CpuKernels:
    """The kernels for one dtype of arithmetic, in which linear layers take their inputs and KV pages are.

    Everything in between is float32. Weights are quantized or in ``dtype``; those for float32 arithmetic may
    also be in bfloat16 or float16. All tensors are contiguous and on the CPU.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._library = library

        def function(name: str, *types: type) -> ctypes._NamedFuncPointer:
            kernel = library[f"{name}_{NAMES[dtype]}"]
            kernel.argtypes, kernel.restype = types, None
            return kernel

        pointer, structs = c_void_p, (POINTER(StepStruct), POINTER(LayerStruct))
        self._pack = function("pack", pointer, pointer, *(c_int64,) * 3)
        self._linear = function("linear", POINTER(MatrixStruct), pointer, pointer, c_int64)
        self._add_rms_norm = function("add_rms_norm", *(pointer,) * 4, c_int64, c_int64, c_float)
        self._gate_and_mul = function("gate_and_mul", pointer, pointer, c_int64, c_int64, c_int64)
        self._attend = function("attend", *structs, pointer, pointer, pointer)
        self._choose_tokens = library["choose_tokens"]
        self._choose_tokens.argtypes = pointer, *(c_int64,) * 3, pointer, pointer
        self._choose_tokens.restype = None
        blocks = (POINTER(StepStruct), POINTER(BlockStruct))
        self._decoder_layers = function("decoder_layers", *blocks, c_int64, c_int64, *(pointer,) * 5)

    @property
    def variant(self) -> str:
        """The instructions that the kernels use, such as ``AVX-512, VNNI, BF16``."""
        return variant(self._library)

    @property
    def tile_rows(self) -> int:
        """How many query vectors attention best takes at once."""
        has_tiles = self.dtype == torch.bfloat16 and self.variant.endswith("AMX")
        return AMX_TILE_ROWS if has_tiles else TILE_ROWS

    def use_threads(self, threads: int) -> None:
        """Set how many threads compute, the calling one included, for all kernels of this process."""
        self._library.use_threads(c_int64(threads), c_int64(usable_cores()))

    def use_tuning(self, chunk_tiles: int, piece: int, *, prefetch: bool) -> None:
        """Set how products are divided, for all kernels of this process; no choice changes a result.

        See `ullm.config.Tuning`.
        """
        self._library.use_tuning(c_int64(chunk_tiles), c_int64(piece), c_int64(prefetch))

    def pack(self, weight: Tensor) -> Tensor:
        """See `LinearKernel.pack`; returns an ordinary tensor, which may be kept in a file.

        Raises:
            TypeError: the kernels for ``dtype`` do not multiply by weights of this dtype.
        """
        if weight.dtype not in self.weight_dtypes:
            raise TypeError(f"weights in {weight.dtype} for arithmetic in {self.dtype}")
        out_features, in_features = weight.shape
        groups = -(-out_features // COLUMNS)
        packed = torch.empty(groups * COLUMNS * in_features, dtype=weight.dtype)
        source = weight.contiguous()
        self._pack(source.data_ptr(), packed.data_ptr(), weight.itemsize, in_features, out_features)
        return packed

    @property
    def weight_dtypes(self) -> frozenset[torch.dtype]:
        """Dtypes of unquantized weights."""
        return weight_dtypes(self.dtype)

    def linear(self, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Linear:
        """See `LinearKernel.linear`; the outputs are float32."""
        offsets = None if bias is None else bias.float().contiguous()
        matrix = matrix_struct(packed, offsets, out_features, in_features)

        def multiply(x: Tensor, keep: tuple[Tensor, Tensor | None] = (packed, offsets)) -> Tensor:
            rows = x.shape[0]
            out = torch.empty((rows, out_features), dtype=torch.float32)
            self._linear(byref(matrix), x.data_ptr(), out.data_ptr(), rows)
            return out

        return multiply

    def pack_quantized(self, weight: QuantizedWeight) -> Tensor:
        """Return a ``Header``, a ``Part`` for each run of outputs with the same bits, and their weights.

        See quantized.cpp for the layout.
        """
        parts, header, sizes = weight.parts(), list[int](), list[int]()
        offset = -(-(64 + 32 * len(parts)) // ALIGNMENT) * ALIGNMENT
        for bits, first, count in parts:
            group_bytes = self._library.quantized_group_bytes(c_int64(bits))
            sizes.append(-(-count // QUANTIZED_COLUMNS) * num_groups(weight.shape[1]) * group_bytes)
            header += [bits, first, count, offset + sum(sizes[:-1])]
        packed = torch.zeros(offset + sum(sizes), dtype=torch.uint8)
        words = torch.tensor([len(parts), *(0,) * 7, *header])
        packed[: words.nbytes] = words.view(torch.uint8)
        for (bits, first, count), place in zip(parts, header[3::4], strict=True):
            rows = weight[first : first + count]
            sources = [tensor.contiguous() for tensor in (rows.codes, rows.scales, rows.minima)]
            to = c_void_p(packed.data_ptr() + place)
            pointers = (c_void_p(tensor.data_ptr()) for tensor in sources)
            self._library.pack_quantized(
                c_int64(bits), *pointers, to, c_int64(weight.shape[1]), c_int64(count)
            )
        return packed

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
        """Add ``delta`` to ``x [rows, size]`` in place; return its norm times ``weight``, in ``dtype``.

        Without a weight, return the sum itself.
        """
        rows, size = x.shape
        out = torch.empty((rows, size), dtype=self.dtype)
        source = None if delta is None else delta.data_ptr()
        scales = None if weight is None else weight.data_ptr()
        self._add_rms_norm(x.data_ptr(), source, scales, out.data_ptr(), rows, size, eps)
        return out

    def gate_and_mul(self, gate_up: Tensor, *, gelu: bool = False) -> Tensor:
        """Return ``silu(gate) * up``, or GELU's: ``[rows, 2 * size]`` → ``[rows, size]`` in ``dtype``."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, size), dtype=self.dtype)
        self._gate_and_mul(gate_up.data_ptr(), out.data_ptr(), rows, size, gelu)
        return out

    def attend(self, step: StepStruct, layer: LayerStruct, qkv: Tensor, pages: Tensor) -> Tensor:
        """Rotate ``qkv`` in place, store keys and values, attend.

        Returns:
            ``[tokens, heads * head_dim]`` in ``dtype``.
        """
        out = torch.empty((step.tokens, layer.heads * layer.head_dim), dtype=self.dtype)
        self._attend(byref(step), byref(layer), qkv.data_ptr(), pages.data_ptr(), out.data_ptr())
        return out

    def decoder_layers(
        self,
        step: StepStruct,
        blocks: Array[BlockStruct],
        layers: range,
        x: Tensor,
        delta: Tensor | None,
        pages: Array[c_void_p],
        exchange: SharedExchange | None = None,
    ) -> Tensor:
        """Compute layers as `StepOps.layers` does; the result is in the memory of ``delta``, if given.

        Args:
            exchange: where several ranks add up their parts.

        Raises:
            RuntimeError: another rank did not answer in time.
        """
        out = torch.empty_like(x) if delta is None else delta
        source = None if delta is None else delta.data_ptr()
        pointers = x.data_ptr(), source, pages, out.data_ptr()
        place = None if exchange is None else byref(exchange.struct)
        self._decoder_layers(byref(step), blocks, layers.start, layers.stop, *pointers, place)
        if exchange is not None:
            exchange.check()
        return out

    def choose_tokens(
        self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]
    ) -> Tensor:
        """See `ullm.model.sampling.choose.choose_tokens`, for logits in float32."""
        rows, size = logits.shape
        numbers = np.array([(*row, uniform) for row, uniform in zip(filters, uniforms, strict=True)])
        tokens = torch.empty(rows, dtype=torch.int64)
        self._choose_tokens(
            logits.data_ptr(), rows, size, logits.stride(0), numbers.ctypes.data, tokens.data_ptr()
        )
        return tokens


def weight_formats(weight: Tensor) -> set[str]:
    """Return what a packed weight is in: the name of its dtype, or ``int8`` or ``int4`` or both."""
    if weight.dtype != torch.uint8:
        return {str(weight.dtype).removeprefix("torch.")}
    num_parts = int(weight[:8].view(torch.int64))
    parts = weight[64 : 64 + 32 * num_parts].view(torch.int64).view(num_parts, 4)
    return {f"int{bits}" for bits in parts[:, 0].tolist()}


def weight_dtypes(dtype: torch.dtype) -> frozenset[torch.dtype]:
    """Return the dtypes of unquantized weights that the kernels for arithmetic in ``dtype`` multiply by."""
    widened = (torch.bfloat16, torch.float16) if dtype == torch.float32 else ()
    return frozenset((dtype, *widened))


def load_kernels(dtype: torch.dtype, progress: Callable[[], None] = lambda: None) -> CpuKernels | None:
    """Return the kernels for ``dtype``; None, and a log line, if they are not available.

    Args:
        progress: called several times a second while they are compiled.
    """
    library = open_library(progress) if dtype in NAMES else None
    return None if library is None else CpuKernels(library, dtype)
