"""OUTPUT/attention: attention.json and the pictures it names, written by an export, read by the report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from vit_export.artifacts import Size
from vit_export.errors import InputError
from vit_export.runtime.report_schema import Part

FOLDER = "attention"
FILE = "attention.json"
SCHEMA: Literal["vit-export.attention/1"] = "vit-export.attention/1"
_MAX_BYTES = 16 << 20


class AttentionLayer(Part, frozen=True, kw_only=True):
    """One layer for one image. kl: nats, null without int8. picture: null with the reason why not.

    query: whose row of the weights a map shows; grid: its rows and columns.
    """

    name: str
    heads: int
    queries: int
    keys: int
    query: str
    grid: Size | None = None
    kl: float | None = None
    picture: str | None = None
    reason: str = ""


class AttentionImage(Part, frozen=True, kw_only=True):
    """One image. layers_picture: every layer's mean over heads; pictures are relative to this file."""

    name: str
    image_size: Size
    float_class: int | None = None
    int8_class: int | None = None
    layers: tuple[AttentionLayer, ...] = ()
    layers_picture: str | None = None
    rollout_picture: str | None = None
    rollout_reason: str = ""


class AttentionFile(Part, frozen=True, kw_only=True):
    """What attention.json holds. int8: how the int8 program was made, or why there is none."""

    model: str
    int8: str
    images: tuple[AttentionImage, ...] = ()
    schema: Literal["vit-export.attention/1"] = SCHEMA


def encode(attention: AttentionFile) -> bytes:
    """As indented JSON."""
    return msgspec.json.format(msgspec.json.encode(attention), indent=2) + b"\n"


def read(output: Path) -> AttentionFile | None:
    """The attention beside a report in `output`, None if there is none. Raises InputError if it is broken."""
    path = output / FOLDER / FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is too large: {path.stat().st_size} bytes")
        return msgspec.json.decode(path.read_bytes(), type=AttentionFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "delete the folder, or export again") from error
