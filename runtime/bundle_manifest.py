"""manifest.json of a bundle: what is in it, with a SHA-256 for every file.

Schema vit-export.bundle/1. Nothing in it depends on the time or the place of the export, so the same
inputs on the same machine give the same bytes; `varies` names the files whose vendor compiler does not
allow that. A manifest is a file from elsewhere: names are limited to plain relative paths, unknown fields
are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vit_export.artifacts import Precision, Preprocessing, Size
from vit_export.errors import InputError, UntrustedInput
from vit_export.runtime.report_schema import Count, EvalData, ImageSize, ModelInfo, Part, Sha256
from vit_export.runtime.runner import RUNNERS

SCHEMA: Literal["vit-export.bundle/1"] = "vit-export.bundle/1"
NAME = "manifest.json"
MAX_FILES = 10_000
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILE_BYTES = 64 << 30
MAX_TOTAL_BYTES = 256 << 30

# One part of a path: no hidden files, no options, nothing a shell or a file system gives a meaning to.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
_MAX_DEPTH = 12
_NOT_FROM_ELSEWHERE = {"pytorch"}  # loads files that may hold pickles


class StoredFile(Part, frozen=True, kw_only=True):
    """One file of the bundle. path: relative to the manifest, with `/`."""

    path: str
    bytes: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]
    sha256: Sha256


class StoredImages(Part, frozen=True, kw_only=True):
    """Preprocessed images with the FP32 baseline's outputs for them, as .npy files.

    pixels: uint8 [N, H, W, 3]; logits: float32 [N, K]; labels: int64 [N], null without labels.
    """

    images: Annotated[int, Meta(ge=1)]
    pixels: str
    logits: str
    labels: str | None = None


class StoredSize(Part, frozen=True, kw_only=True):
    """Everything for one image size. runtime, runtime_version: what computed the FP32 outputs."""

    preprocessing: Preprocessing
    preprocessing_sha256: Sha256
    golden: StoredImages
    evaluation: StoredImages
    runtime: str
    runtime_version: str = ""

    @property
    def image_size(self) -> Size:
        """(height, width) of the network's input."""
        return self.preprocessing.size


class StoredArtifact(Part, frozen=True, kw_only=True):
    """One artifact. runner, options: how a worker opens it.

    sqnr_db: against FP32 where it was exported, null where it could not run there or had no error.
    """

    target: Annotated[str, Meta(pattern="^[a-z][a-z0-9_-]{0,31}$")]
    precision: Precision
    image_size: ImageSize
    path: str
    bytes: Count
    runner: str
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    kept_float: tuple[str, ...] = ()
    float_fallback_ops: Count | None = None
    sqnr_db: float | None = None


class Manifest(Part, frozen=True, kw_only=True):
    """The bundle. batch_size: that artifacts were fixed to, null for a dynamic batch.

    evaluation: where the images came from, null for seeded noise. plans: plan.json files.
    versions: of the packages that made it. varies: files that differ between two identical exports.
    """

    model: ModelInfo
    evaluation: EvalData | None
    sizes: tuple[StoredSize, ...]
    artifacts: tuple[StoredArtifact, ...]
    files: tuple[StoredFile, ...]
    plans: tuple[str, ...] = ()
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    varies: tuple[str, ...] = ()
    batch_size: Annotated[int, Meta(ge=1, le=4096)] | None = None
    schema: Literal["vit-export.bundle/1"] = SCHEMA

    def size(self, image_size: Size) -> StoredSize:
        """The images of one size. Raises InputError if the bundle has none."""
        for stored in self.sizes:
            if stored.image_size == image_size:
                return stored
        raise InputError(f"the bundle has no images of {image_size[0]}x{image_size[1]}")


class _Header(msgspec.Struct):
    schema: str = ""


def encode(manifest: Manifest) -> bytes:
    """The manifest as indented JSON; the same manifest gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(data: bytes, where: str) -> Manifest:
    """A manifest that is whole and consistent.

    Raises UntrustedInput for a path that could leave the bundle or is there twice, InputError for
    anything else that is not a manifest of this version. where: for the message.
    """
    try:
        found = msgspec.json.decode(data, type=_Header).schema
        if found != SCHEMA:
            raise InputError(
                f"{where} is not a {SCHEMA} bundle but {found or 'something else'}",
                "export and verify with the same version of vit-export",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{where}: {NAME} is not valid: {error}", "copy the bundle again") from error
    _check(manifest, where)
    return manifest


def check_name(name: str, where: str) -> None:
    """Raise UntrustedInput unless `name` is a plain relative path that stays below its folder."""
    parts = name.split("/")
    if len(parts) > _MAX_DEPTH or not all(_PART.fullmatch(part) for part in parts):
        raise UntrustedInput(
            f"{where} holds a file named {name!r}", "a bundle has plain relative names only; do not use it"
        )


def check_unique(names: list[str], where: str) -> None:
    """Raise UntrustedInput if two names are one on a file system that ignores case."""
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            raise UntrustedInput(f"{where} holds {name} twice", "do not use it")
        seen.add(name.lower())


def _check(manifest: Manifest, where: str) -> None:
    names = [file.path for file in manifest.files]
    if len(names) > MAX_FILES:
        raise UntrustedInput(f"{where} lists {len(names)} files, the limit is {MAX_FILES}")
    for name in names:
        check_name(name, where)
    check_unique([NAME, *names], where)
    if sum(file.bytes for file in manifest.files) > MAX_TOTAL_BYTES:
        raise UntrustedInput(f"{where} announces more than {MAX_TOTAL_BYTES >> 30} GiB")
    known = {*names, *(parent for name in names for parent in _parents(name))}
    for name in _referred(manifest):
        if name not in known:
            raise InputError(f"{where}: {NAME} refers to {name}, which the bundle does not list")
    for size in manifest.sizes:
        if size.preprocessing.digest() != size.preprocessing_sha256:
            raise InputError(f"{where}: the preprocessing contract is not the one it was signed with")
    for artifact in manifest.artifacts:
        manifest.size(artifact.image_size)
        if artifact.runner not in RUNNERS.keys() - _NOT_FROM_ELSEWHERE:
            raise UntrustedInput(f"{where} asks for the runner {artifact.runner!r}", "do not use it")


def _referred(manifest: Manifest) -> Iterator[str]:
    """Every path the manifest uses outside its list of files."""
    yield from manifest.plans
    yield from manifest.varies
    for artifact in manifest.artifacts:
        yield artifact.path
    for size in manifest.sizes:
        for images in (size.golden, size.evaluation):
            yield from (images.pixels, images.logits)
            if images.labels is not None:
                yield images.labels


def _parents(name: str) -> Iterator[str]:
    """The folders above a file: an artifact may be a folder (.mlpackage)."""
    parts = name.split("/")
    yield from ("/".join(parts[:count]) for count in range(1, len(parts)))
