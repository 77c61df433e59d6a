"""The GGUF container: metadata, and the places of tensors. Needs numpy, not torch.

`gguf.GGUFReader` turns each string of a vocabulary into numpy views, which takes two seconds for 49k tokens,
and reads beyond the end of a truncated file without noticing. This reader takes a tenth of that and checks
every length against the file's. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import dequantize

from ullm.errors import ModelFileBroken, ModelNotFound, ModelUnsupported
from ullm.hub.files import MAX_HEADER, gguf_part_names, special_kind

SUPPORTED_VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_ITEMS = 1 << 22
"""Items of an array, 15 times those of the largest vocabularies: as Python's objects they take many times
their bytes in the file."""
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
PLAIN_TYPES: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.F64: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """The place of a tensor in the file.

    Args:
        name: the tensor's name.
        type: its format.
        shape: outermost dimension first, as in torch (GGUF stores the reverse).
        offset: position of its first byte in the file.
        num_bytes: its size as stored.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufFile:
    """A GGUF file, memory-mapped, with its header read and checked; with the other parts of a split one.

    Args:
        path: the file; of a split one, the first part.
        first: False for the other parts.

    Raises:
        ModelNotFound: there is no such file.
        ModelFileBroken: the file is not GGUF, or is truncated.
        ModelUnsupported: the version, or the type of a tensor, cannot be read.
    """

    def __init__(self, path: str | Path, *, first: bool = True) -> None:
        self.path = Path(path)
        self._data = _map(self.path)
        self._position = 0
        try:
            self.metadata, self.tensors = self._read_header()
        except UnicodeDecodeError as error:
            raise self.broken(f"a name in the header is not UTF-8 ({error.reason})") from error
        self._owners: dict[str, GgufFile] = {}
        for part in gguf_parts(self.path)[1:] if first and self.metadata.get("split.count", 1) != 1 else ():
            other = GgufFile(part, first=False)
            if twice := sorted(self.tensors.keys() & other.tensors.keys()):
                raise other.broken(f"the tensor {twice[0]!r} is in another part as well")
            self.tensors |= other.tensors
            self._owners |= dict.fromkeys(other.tensors, other)
        if first:
            self._check_count()

    def _check_count(self) -> None:
        """Refuse a model in parts some of which are missing, or of another model."""
        count = self.metadata.get("split.tensors.count")
        if isinstance(count, int) and count != len(self.tensors):
            raise self.broken(f"its parts have {len(self.tensors)} tensors in all, and it says {count}")

    def broken(self, detail: str) -> ModelFileBroken:
        """Return an error about this file."""
        return ModelFileBroken(self.path, detail)

    def require(self, key: str) -> Any:
        """Return a metadata value that must exist.

        Raises:
            ModelFileBroken: it does not; names the key.
        """
        if key not in self.metadata:
            raise self.broken(f"the metadata lacks {key!r}")
        return self.metadata[key]

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a metadata value that must be one positive number.

        Raises:
            ModelFileBroken: it is missing without a default, or something else; names the key.
        """
        value = self.require(key) if default is None else self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.broken(f"the metadata's {key!r} is {value!r}, not one positive number")
        return value

    def raw(self, name: str, index: int | None = None) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes as stored, a read-only view of the mapped file; see `values`."""
        if name in self._owners:
            return self._owners[name].raw(name, index)
        tensor = self.tensors[name]
        whole = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        return whole if index is None else whole.reshape(tensor.shape[0], -1)[index]

    def values(self, name: str, index: int | None = None) -> npt.NDArray[Any]:
        """Return a tensor's values in its shape: float32 if it is quantized, else as stored.

        Args:
            index: only this place of the outermost dimension, which the result lacks.

        Raises:
            ModelUnsupported: `gguf.quants` does not know the quantization.
        """
        tensor, raw = self.tensors[name], self.raw(name, index)
        shape = tensor.shape if index is None else tensor.shape[1:]
        if tensor.type in PLAIN_TYPES:
            plain: npt.NDArray[Any] = raw.view(PLAIN_TYPES[tensor.type])
            return plain.reshape(shape)
        try:
            rows = raw.reshape(*shape[:-1], -1)
            with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
                return np.asarray(dequantize(rows, tensor.type)).reshape(shape)
        except NotImplementedError as error:
            raise ModelUnsupported(f"{self.path}: tensor {name!r} is {tensor.type.name}: {error}") from error

    def _read_header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        self._check_magic()
        num_tensors, num_values = self._unpack("QQ")
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            if key in metadata:
                raise self.broken(f"the metadata have {key!r} twice")
            metadata[key] = self._value(self._unpack("I")[0], key)
        entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(num_tensors):
            name, kind, shape, offset = self._tensor_entry()
            if name in entries:
                raise self.broken(f"there are two tensors {name!r}")
            entries[name] = kind, shape, offset
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.broken(f"general.alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        tensors = {name: self._place(start, name, *entry) for name, entry in entries.items()}
        self._check_places(tensors, alignment)
        return metadata, tensors

    def _check_places(self, tensors: dict[str, GgufTensor], alignment: int) -> None:
        """Refuse tensors that share bytes or begin out of step: nothing else tells of a wrong offset."""
        for tensor in tensors.values():
            if tensor.offset % alignment:
                raise self.broken(
                    f"the tensor {tensor.name!r} begins at byte {tensor.offset}, no multiple of {alignment}"
                )
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for one, other in pairwise(ordered):
            if other.offset < one.offset + one.num_bytes:
                raise self.broken(f"the tensors {one.name!r} and {other.name!r} overlap")

    def _check_magic(self) -> None:
        if len(self._data) < 24 or self._unpack("I")[0] != GGUF_MAGIC:
            raise self.broken("not a GGUF file (it does not start with 'GGUF')")
        version = self._unpack("I")[0]
        if version not in SUPPORTED_VERSIONS:
            hint = " (written for a big-endian machine)" if version >> 16 else ""
            raise ModelUnsupported(
                f"{self.path}: GGUF version {version}{hint} cannot be read; versions 2 and 3 can"
            )

    def _take(self, size: int) -> int:
        """Skip ``size`` bytes and return their position."""
        start = self._position
        if size > len(self._data) - start:
            raise self.broken(f"truncated: the header needs more than the file's {len(self._data)} bytes")
        if start + size > MAX_HEADER:
            raise self.broken(f"its header has more than {MAX_HEADER} bytes; at most these are read")
        self._position = start + size
        return start

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout)))

    def _string(self) -> str:
        size = self._unpack("Q")[0]
        start = self._take(size)
        return self._data[start : start + size].decode("utf-8")

    def _value(self, type_id: int, key: str) -> Any:
        if type_id == GGUFValueType.STRING:
            return self._string()
        if type_id == GGUFValueType.ARRAY:
            item_type, count = self._unpack("IQ")
            if count > MAX_ITEMS:
                raise self.broken(f"metadata {key!r} has {count} items; at most {MAX_ITEMS} are read")
            if item_type == GGUFValueType.ARRAY:
                raise self.broken(f"metadata {key!r} is an array of arrays, which no model has")
            if item_type in _SCALARS:
                code = _SCALARS[GGUFValueType(item_type)]
                start = self._take(count * struct.calcsize("<" + code))
                return list(struct.unpack_from(f"<{count}{code}", self._data, start))
            return [self._value(item_type, key) for _ in range(count)]
        if type_id in _SCALARS:
            return self._unpack(_SCALARS[GGUFValueType(type_id)])[0]
        raise self.broken(f"metadata {key!r} has the unknown type {type_id}")

    def _tensor_entry(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        num_dimensions = self._unpack("I")[0]
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self.broken(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = self._unpack(f"{num_dimensions}Q")[::-1]
        type_id, offset = self._unpack("IQ")
        return name, type_id, shape, offset

    def _place(self, start: int, name: str, type_id: int, shape: tuple[int, ...], offset: int) -> GgufTensor:
        try:
            kind = GGMLQuantizationType(type_id)
        except ValueError as error:
            raise ModelUnsupported(f"{self.path}: tensor {name!r} has the unknown type {type_id}") from error
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % per_block:
            raise self.broken(
                f"tensor {name!r}: rows of {shape[-1]} values do not fit {kind.name} blocks of {per_block}"
            )
        num_bytes = math.prod(shape) // per_block * block_bytes
        if start + offset + num_bytes > len(self._data):
            raise self.broken(
                f"truncated: tensor {name!r} ends at byte {start + offset + num_bytes}, "
                f"the file at {len(self._data)}"
            )
        return GgufTensor(name, kind, tuple(shape), start + offset, num_bytes)


def gguf_parts(path: Path) -> list[Path]:
    """Return the files of a model: one, or all parts of a split one, the first of which is named.

    Raises:
        ModelNotFound: a part is missing; names it.
        ModelUnsupported: another part than the first is named.
    """
    try:
        parts = [path.with_name(name) for name in gguf_part_names(path.name)]
    except ModelUnsupported as error:
        raise ModelUnsupported(f"{path.parent}{os.sep}{error}") from None
    for part in parts[1:]:
        if not part.is_file():
            raise ModelNotFound(f"{part}: this part of the model is missing")
    return parts


def _map(path: Path) -> mmap.mmap | bytes:
    if kind := special_kind(path):
        raise ModelFileBroken(path, f"{kind} and not a file; put a file there")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path}: no such file") from error
    except ValueError:  # an empty file cannot be mapped
        return b""
    except OSError as error:
        raise ModelFileBroken(path, f"cannot be read: {error.strerror or error}") from error
