"""The compiled kernels as functions of tensors; `kernels.cpp` says what they compute."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from ullm.model.cpu.build import open_library

LANES = 16
"""``head_dim`` must be a multiple; as in kernels.cpp."""
MAX_GROUP = 64
"""Most query heads per KV head; as in kernels.cpp."""
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class StepStruct(ctypes.Structure):
    """``Step`` of kernels.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "decodes", "table_width", "block_size")),
        *((name, c_void_p) for name in ("positions", "slots", "tables", "lens")),
    )


class LayerStruct(ctypes.Structure):
    """``Layer`` of kernels.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "window")),
        *((name, c_float) for name in ("scale", "norm_eps")),
        *((name, c_void_p) for name in ("cosines", "sines", "q_norm", "k_norm")),
    )


class Kernels:
    """The kernels for one kind of number. All tensors are contiguous and on the CPU."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        name = NAMES[dtype]
        self._add_rms_norm = library[f"add_rms_norm_{name}"]
        self._add_rms_norm.argtypes = (*(c_void_p,) * 4, c_int64, c_int64, c_float)
        self._silu_and_mul = library[f"silu_and_mul_{name}"]
        self._silu_and_mul.argtypes = (c_void_p, c_void_p, c_int64, c_int64)
        self._attend = library[f"attend_{name}"]
        self._attend.argtypes = (POINTER(StepStruct), POINTER(LayerStruct), *(c_void_p,) * 3)
        for function in (self._add_rms_norm, self._silu_and_mul, self._attend):
            function.restype = None

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """``x [rows, size]`` float32 += ``delta``; returns the norm of it times ``weight``, float32."""
        rows, size = x.shape
        out = torch.empty((rows, size), dtype=self.dtype)
        source = None if delta is None else delta.data_ptr()
        self._add_rms_norm(x.data_ptr(), source, weight.data_ptr(), out.data_ptr(), rows, size, eps)
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """``[rows, 2 * size]`` → ``[rows, size]``."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, size), dtype=self.dtype)
        self._silu_and_mul(gate_up.data_ptr(), out.data_ptr(), rows, size)
        return out

    def attend(self, step: StepStruct, layer: LayerStruct, qkv: Tensor, pages: Tensor) -> Tensor:
        """Rotate in place, store, and attend for sequences of one query; ``[tokens, heads * head_dim]``."""
        out = torch.empty((step.tokens, layer.heads * layer.head_dim), dtype=self.dtype)
        self._attend(byref(step), byref(layer), qkv.data_ptr(), pages.data_ptr(), out.data_ptr())
        return out


def load_kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for ``dtype``; None where there are none, with a line in the log."""
    library = open_library() if dtype in NAMES else None
    return None if library is None else Kernels(library, dtype)
