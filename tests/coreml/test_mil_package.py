"""Damaged, foreign and hostile packages are noticed before anything is computed with them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.proto import Model_pb2

from vit_export.errors import InputError, UntrustedInput
from vit_export.python310 import sha256_of
from vit_export.runtime.coreml_interpreter import Interpreter
from vit_export.runtime.mil_program import DIGEST_KEY, Package

WEIGHT = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
RECORD = 64  # the first tensor's record follows the header
DATA = 128
INPUT = {"x": np.ones((1, 8), np.float32)}


@pytest.fixture
def package(save: Any) -> Path:
    """One linear; its weight and bias are the only tensors in the weight file."""

    @mb.program(input_specs=[mb.TensorSpec((1, 8))], opset_version=ct.target.iOS18)
    def linear(x: Any) -> Any:
        return mb.linear(x=x, weight=WEIGHT, bias=WEIGHT[:, 0].copy(), name="y")

    path: Path = save(linear)
    return path


def weights(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/weights/weight.bin"


def model_file(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/model.mlmodel"


def overwrite(file: Path, offset: int, data: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[offset : offset + len(data)] = data
    file.write_bytes(content)


def edit(package: Path, change: Any) -> None:
    """Apply `change` to the parsed model and write it back."""
    model = Model_pb2.Model.FromString(model_file(package).read_bytes())
    change(model)
    model_file(package).write_bytes(model.SerializeToString())


def seal(package: Path) -> None:
    """Leave the digest of the weights in the metadata, as the exporter does."""
    digest = sha256_of(weights(package))
    edit(package, lambda m: m.description.metadata.userDefined.update({DIGEST_KEY + "weight.bin": digest}))


def test_reads_the_weights_that_were_written(package: Path) -> None:
    """The result of the saved file is the product with the weights it was made from."""
    result = Interpreter(package).predict(INPUT)["y"]
    np.testing.assert_allclose(result, INPUT["x"] @ WEIGHT.T + WEIGHT[:, 0], rtol=1e-6)


DAMAGE = {  # name: (offset, bytes, words of the message)
    "header version": (4, struct.pack("<I", 1), "format 1"),
    "empty header": (0, bytes(64), "0 tensors"),
    "sentinel": (RECORD, b"\0", "does not start a tensor"),
    "element type": (RECORD + 4, struct.pack("<I", 1), "has type 1"),
    "size": (RECORD + 8, struct.pack("<Q", 16 * 8 * 4 - 4), "bytes"),
    "data offset beyond the end": (RECORD + 16, struct.pack("<Q", 1 << 40), "ends outside"),
    "data offset unaligned": (RECORD + 16, struct.pack("<Q", DATA + 4), "ends outside"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_record_is_noticed(name: str, package: Path) -> None:
    """Every field of a weight record is checked against the program and the file."""
    offset, data, words = DAMAGE[name]
    overwrite(weights(package), offset, data)
    with pytest.raises(InputError, match=words):
        Interpreter(package)


@pytest.mark.parametrize("keep", [0, 63, 64, 100, 127, 200, 600])
def test_truncated_weights_are_noticed(keep: int, package: Path) -> None:
    """A weight file cut anywhere is refused, without a digest."""
    weights(package).write_bytes(weights(package).read_bytes()[:keep])
    with pytest.raises(InputError, match=r"weight\.bin"):
        Interpreter(package)


def test_missing_weights_are_noticed(package: Path) -> None:
    """A package without its weight file is refused."""
    weights(package).unlink()
    with pytest.raises(InputError, match="missing"):
        Interpreter(package)


@pytest.mark.parametrize("offset", [DATA, DATA + 137, -1])
def test_one_flipped_bit_is_noticed(offset: int, package: Path) -> None:
    """A single bit of weight data, which no record can show, is noticed through the stored SHA-256."""
    seal(package)
    Interpreter(package)
    content = bytearray(weights(package).read_bytes())
    content[offset] ^= 1
    weights(package).write_bytes(content)
    with pytest.raises(InputError, match="SHA-256 differs"):
        Interpreter(package)


def test_sealed_weight_file_that_is_missing_is_noticed(package: Path) -> None:
    """A digest for a file that is not there is an error, not a skipped check."""
    seal(package)
    weights(package).unlink()
    with pytest.raises(InputError, match="not the weight file"):
        Package(package)


def test_program_that_points_elsewhere_in_the_file_is_noticed(package: Path) -> None:
    """A changed offset in the program does not read another tensor or the middle of one."""

    def shift(model: Any) -> None:
        operations = model.mlProgram.functions["main"].block_specializations["CoreML8"].operations
        for op in operations:
            if op.type == "const" and op.attributes["val"].HasField("blobFileValue"):
                op.attributes["val"].blobFileValue.offset += 64

    edit(package, shift)
    with pytest.raises(InputError, match="weight file"):
        Interpreter(package)


@pytest.mark.parametrize("name", ["@model_path/../../../../secret.bin", "/etc/hostname", "../../../x"])
def test_weight_file_outside_the_package_is_refused(name: str, package: Path) -> None:
    """A program cannot make us read another file."""

    def escape(model: Any) -> None:
        operations = model.mlProgram.functions["main"].block_specializations["CoreML8"].operations
        for op in operations:
            if op.type == "const" and op.attributes["val"].HasField("blobFileValue"):
                op.attributes["val"].blobFileValue.fileName = name

    edit(package, escape)
    with pytest.raises(UntrustedInput, match="outside itself"):
        Interpreter(package)


def test_manifest_outside_the_package_is_refused(package: Path) -> None:
    """A manifest cannot name another model."""
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../other.mlmodel"
    (package / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UntrustedInput, match="outside itself"):
        Package(package)


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"rootModelIdentifier": "a", "itemInfoEntries": {}}'])
def test_broken_manifest(manifest: str, package: Path) -> None:
    """A manifest that is no JSON, or names no model, is one clear error."""
    (package / "Manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=r"Manifest\.json"):
        Package(package)


def test_what_is_no_package(tmp_path: Path) -> None:
    """A missing path, an empty folder and a file are refused alike."""
    (tmp_path / "empty.mlpackage").mkdir()
    (tmp_path / "file.mlpackage").write_bytes(b"x")
    for name in ("missing", "empty", "file"):
        with pytest.raises(InputError, match="not a Core ML package"):
            Package(tmp_path / f"{name}.mlpackage")


def test_broken_protobuf(package: Path) -> None:
    """A model file that is no protobuf, or holds another kind of model, is refused."""
    model_file(package).write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not a readable Core ML model"):
        Package(package)
    other = Model_pb2.Model()
    other.glmRegressor.offset.append(1.0)
    model_file(package).write_bytes(other.SerializeToString())
    with pytest.raises(InputError, match="glmRegressor, not an ML program"):
        Package(package)


def test_element_type_of_later_versions_is_named(package: Path) -> None:
    """A tensor type that is not known here is named, not guessed."""

    def retype(model: Any) -> None:
        operations = model.mlProgram.functions["main"].block_specializations["CoreML8"].operations
        for op in operations:
            if op.type == "const" and op.attributes["val"].HasField("blobFileValue"):
                op.attributes["val"].type.tensorType.dataType = 40  # FLOAT8E4M3FN

    edit(package, retype)
    with pytest.raises(InputError, match="float8e4m3fn"):
        Interpreter(package)
