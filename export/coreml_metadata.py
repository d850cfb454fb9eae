"""The last step on a saved package: what it says about itself, and that the same inputs give the same bytes.

coremltools writes random identifiers, the date and maps in no fixed order, and leaves a debug file; here
the package gets its metadata, a SHA-256 of its weights (the format has no checksum of its own), and one
canonical form.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vit_export import __version__
from vit_export.artifacts import BuildRequest, Precision, Preprocessing, Program
from vit_export.export.coreml_options import CoreMLOptions
from vit_export.python310 import sha256_of

PREFIX = "vit_export."
DIGEST_KEY = f"{PREFIX}sha256."  # + name of a weight file; runtime/mil_program.py checks it
PREPROCESSING_KEY = f"{PREFIX}preprocessing"  # runtime/coreml_runner.py reads it
_DATE = "com.github.apple.coremltools.conversion_date"
_MODEL = "Data/com.apple.CoreML/model.mlmodel"


def facts(program: Program, request: BuildRequest) -> dict[str, str]:
    """User-defined metadata: versions, the preprocessing contract, a digest of the source's tensors, and
    what the pipeline knows (request.metadata)."""
    return {
        f"{PREFIX}version": __version__,
        f"{PREFIX}precision": str(request.precision),
        f"{PREFIX}source_sha256": _source_digest(program),
        PREPROCESSING_KEY: json.dumps(asdict(request.preprocessing), sort_keys=True),
        f"{PREPROCESSING_KEY}_sha256": request.preprocessing.digest(),
        **{f"{PREFIX}{key}": value for key, value in request.metadata.items()},
    }


def describe(
    precision: Precision, preprocessing: Preprocessing, name: str, options: CoreMLOptions
) -> Callable[[Any], None]:
    """What fills in the texts of a specification's `description`, as Xcode shows them. name: the model's."""

    def fill(description: Any) -> None:
        metadata = description.metadata
        metadata.author = options.author
        metadata.license = options.license
        metadata.versionString = f"vit-export {__version__}"
        metadata.shortDescription = f"{name}, {precision}"
        for feature in description.input:
            feature.shortDescription = _input_text(preprocessing, options)
        for feature in description.output:
            feature.shortDescription = _OUTPUTS.get(feature.name, "probability of each class")

    return fill


_OUTPUTS = {
    "logits": "scores of the classes in index order, before softmax",
    "classLabel": "the likeliest class",
}


def _input_text(contract: Preprocessing, options: CoreMLOptions) -> str:
    height, width = contract.size
    resized = f"{contract.interpolation} resize, {contract.crop_mode} crop at {contract.crop_pct:g}"
    if options.input == "image":
        return f"RGB image {width}x{height} ({resized}); normalised inside"
    return f"RGB float32 NCHW {height}x{width} ({resized}): (pixel / 255 - {contract.mean}) / {contract.std}"


def finish(package: Path, fill: Callable[[Any], None], user_defined: Mapping[str, str]) -> Any:
    """Describe and seal a saved package in place; its specification as it was written."""
    for stray in package.glob("*debug_handle*"):
        stray.unlink()
    spec = read_spec(package)
    fill(spec.description)
    stored = spec.description.metadata.userDefined
    stored.update(user_defined)
    stored.pop(_DATE, None)
    for weights in sorted((package / _MODEL).parent.glob("weights/*")):
        stored[DIGEST_KEY + weights.name] = sha256_of(weights)
    (package / _MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    _settle_manifest(package / "Manifest.json")
    return spec


def read_spec(package: Path) -> Any:
    """The protobuf specification of a saved package."""
    from coremltools.proto import Model_pb2

    return Model_pb2.Model.FromString((package / _MODEL).read_bytes())


def _settle_manifest(file: Path) -> None:
    """Identifiers made from what they stand for instead of random ones, in a fixed order."""
    manifest = json.loads(file.read_text(encoding="utf-8"))
    entries = manifest["itemInfoEntries"]
    names = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])) for old, entry in entries.items()}
    manifest["itemInfoEntries"] = {names[old]: entry for old, entry in entries.items()}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    file.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _source_digest(program: Program) -> str:
    """SHA-256 over names and values of the program's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(program.graph.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
