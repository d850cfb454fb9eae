"""The metadata of an .onnx file, read without a protobuf library and without reading its weights.

A file is a protobuf message: fields, each a varint of (number << 3 | wire type) and its content. Field 14 of
ModelProto is an entry of metadata_props, itself a message of a key (1) and a value (2); see onnx.proto.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

SESSION = "session"  # session options that tuning chose, as JSON
_METADATA_PROPS = 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_ENTRY = 1 << 20


def metadata(path: Path) -> dict[str, str]:
    """metadata_props of an ONNX file; of one that is cut or damaged what stands before the damage, for
    the runtime will say what is wrong with it."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        for number, entry in _fields(file, _METADATA_PROPS):
            if number == _METADATA_PROPS:
                pair = dict(_fields(io.BytesIO(entry), None))
                found[pair.get(1, b"").decode("utf-8", "replace")] = pair.get(2, b"").decode(
                    "utf-8", "replace"
                )
    return found


def _fields(file: IO[bytes], wanted: int | None) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the length-delimited fields that are `wanted` (None: all); others are skipped."""
    while (tag := _varint(file)) is not None:
        number, kind = tag >> 3, tag & 7
        if number == 0:
            return  # no protobuf
        if kind == _VARINT:
            _varint(file)
        elif kind in (_FIXED64, _FIXED32):
            file.seek(8 if kind == _FIXED64 else 4, io.SEEK_CUR)
        elif kind == _BYTES and (length := _varint(file)) is not None:
            if (wanted is None or number == wanted) and length <= _MAX_ENTRY:
                yield number, file.read(length)
            else:
                file.seek(length, io.SEEK_CUR)
        else:
            return  # a group, which ONNX does not use


def _varint(file: IO[bytes]) -> int | None:
    """The next base-128 number, None at the end of the file or where there is none."""
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
