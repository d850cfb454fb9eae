"""Weight files of a Core ML package, read with every check that the format allows.

A MIL blob file (coremltools' MILBlob, `StorageFormat.hpp`) is a 64-byte header, then for each tensor a
64-byte record followed by its data, everything aligned to 64 bytes. A program refers to the offset of a
record; the record repeats the element type and the size, so that a wrong offset, a truncated file or a
record that was overwritten is noticed. The format has no checksum: `digest` is compared with the one
that the exporter left in the package's metadata.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vit_export.errors import InputError

Array = npt.NDArray[Any]

_HEADER = struct.Struct("<II")  # number of tensors, format version
_RECORD = struct.Struct("<IIQQQ")  # sentinel, element type, bytes, data offset, unused bits at the end
_SENTINEL = 0xDEADBEEF
_ALIGNMENT = 64
_VERSION = 2


@dataclass(frozen=True, slots=True)
class ElementType:
    """How one MIL element type is stored: numpy type that holds it, width, and its code in blob files."""

    container: type[np.generic]
    bits: int
    blob_code: int | None = None


ELEMENT_TYPES = {  # keys are the names of MIL.proto's DataType
    "FLOAT16": ElementType(np.float16, 16, 1),
    "FLOAT32": ElementType(np.float32, 32, 2),
    "FLOAT64": ElementType(np.float64, 64),
    "BOOL": ElementType(np.bool_, 8),
    "INT8": ElementType(np.int8, 8, 4),
    "INT16": ElementType(np.int16, 16, 6),
    "INT32": ElementType(np.int32, 32, 14),
    "INT64": ElementType(np.int64, 64),
    "UINT8": ElementType(np.uint8, 8, 3),
    "UINT16": ElementType(np.uint16, 16, 7),
    "UINT32": ElementType(np.uint32, 32, 15),
    "INT4": ElementType(np.int8, 4, 8),
    "UINT1": ElementType(np.uint8, 1, 9),
    "UINT2": ElementType(np.uint8, 2, 10),
    "UINT3": ElementType(np.uint8, 3, 12),
    "UINT4": ElementType(np.uint8, 4, 11),
    "UINT6": ElementType(np.uint8, 6, 13),
}


def element_type(name: str) -> ElementType:
    """The storage of a MIL element type; raises InputError for one that ViT packages do not use."""
    if name not in ELEMENT_TYPES:
        raise InputError(f"the Core ML package holds a tensor of type {name.lower()}, which is not supported")
    return ELEMENT_TYPES[name]


def unpack(data: Array, name: str, count: int) -> Array:
    """Elements of type `name` from little-endian bytes (uint8 [M]); [count] in the type's container.

    Elements narrower than a byte are packed from the least significant bit on:
    `unpack([0xE4], "UINT2", 4)` is [0, 1, 2, 3].
    """
    kind = element_type(name)
    if kind.bits >= 8:
        stored: Array = data.view(np.dtype(kind.container).newbyteorder("<"))
        return stored.astype(kind.container)
    bits = np.unpackbits(data, count=count * kind.bits, bitorder="little").reshape(count, kind.bits)
    values: Array = (bits << np.arange(kind.bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if name.startswith("INT"):  # two's complement in `bits` bits
        sign = 1 << (kind.bits - 1)
        values = (values ^ sign).astype(np.int8) - np.int8(sign)
    return values


class WeightFile:
    """One memory-mapped blob file of a package."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file() or path.stat().st_size < _ALIGNMENT:
            raise self._broken("missing or too short for a header")
        self._bytes: Array = np.memmap(path, np.uint8, mode="r")
        count, version = _HEADER.unpack_from(self._bytes.data, 0)
        if version != _VERSION or count == 0:
            raise self._broken(f"header says {count} tensors in format {version}, expected format {_VERSION}")

    def read(self, offset: int, dtype: str, shape: Sequence[int]) -> Array:
        """The tensor whose record is at `offset`, which must have this type and shape.

        Raises InputError when the record is not one, disagrees with the program, or points outside.
        """
        if offset % _ALIGNMENT or offset < _ALIGNMENT or offset + _ALIGNMENT > self._bytes.size:
            raise self._broken(f"no tensor can start at byte {offset} of {self._bytes.size}")
        sentinel, code, size, start, padding = _RECORD.unpack_from(self._bytes.data, offset)
        count, kind = math.prod(shape), element_type(dtype)
        want = -(-count * kind.bits // 8)
        if sentinel != _SENTINEL:
            raise self._broken(f"byte {offset} does not start a tensor")
        if (
            code != kind.blob_code
            or size != want
            or (kind.bits < 8 and padding != want * 8 - count * kind.bits)
        ):
            raise self._broken(
                f"the tensor at byte {offset} has type {code} and {size} bytes, "
                f"but the program declares {dtype.lower()} {list(shape)} ({want} bytes)"
            )
        if start % _ALIGNMENT or start + size > self._bytes.size:
            raise self._broken(
                f"the tensor at byte {offset} ends outside the file ({self._bytes.size} bytes)"
            )
        return unpack(self._bytes[start : start + size], dtype, count).reshape(tuple(shape))

    def _broken(self, what: str) -> InputError:
        return InputError(
            f"{self._path} is not a usable Core ML weight file: {what}",
            "the package is damaged or was copied incompletely; export or copy it again",
        )
