"""A Core ML program read from a saved .mlpackage: its functions, operations and constants.

Only files are read (`Manifest.json`, the protobuf `model.mlmodel` and the weight files). Nothing of the
converter's in-memory program is involved: what is run here is what a device would load.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vit_export.errors import InputError, MissingExtra, UnsupportedOperator, UntrustedInput
from vit_export.python310 import sha256_of
from vit_export.runtime.mil_weights import Array, WeightFile, element_type, unpack

DIGEST_KEY = "vit_export.sha256."  # + name of a weight file: an entry of the user-defined metadata
_SCHEMA = "vit_export_coreml_schema"
_COLORS = {20: "RGB", 30: "BGR"}  # ImageFeatureType.ColorSpace
Value = Array | str | list[Any]


@dataclass(frozen=True, slots=True)
class Declared:
    """Type of a value as the program states it.

    dtype: a DataType name of MIL.proto; "" for what is no tensor (classes and scores of a classifier).
    shape: None for a dimension that is not fixed.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Feature:
    """An input of a function. colors: RGB or BGR for an image, "" for a tensor.

    declared: NCHW float for an image; that is what the first operation sees.
    """

    name: str
    declared: Declared
    colors: str = ""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. `arguments`: parameter → names of values, more than one for variadic parameters."""

    kind: str
    arguments: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, Declared]


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """One function, its operations in execution order. `constants` are as stored, still compressed."""

    name: str
    inputs: Mapping[str, Declared]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[str, tuple[Value, Declared]] = field(repr=False)


class Package:
    """A saved .mlpackage. Raises InputError for what is missing, damaged or no ML program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model_file = _model_file(path)
        self._weights: dict[Path, WeightFile] = {}
        self.spec = _parse(self._model_file)
        self.metadata: Mapping[str, str] = dict(self.spec.description.metadata.userDefined)
        self._check_digests()

    @property
    def function_names(self) -> tuple[str, ...]:
        """Names of all functions, the default one first."""
        default = self.spec.description.defaultFunctionName or "main"
        return tuple(sorted(self.spec.mlProgram.functions, key=lambda name: (name != default, name)))

    def inputs(self, function: str) -> tuple[Feature, ...]:
        """Inputs of a function in order. Raises InputError naming the functions that exist."""
        images = {
            feature.name: _COLORS.get(feature.type.imageType.colorSpace)
            for feature in self._description(function).input
            if feature.type.WhichOneof("Type") == "imageType"
        }
        if None in images.values():
            raise UnsupportedOperator(f"{self.path} takes an image that is neither RGB nor BGR")
        proto = self._proto(function)
        return tuple(
            Feature(value.name, _declared(value.type), images.get(value.name) or "") for value in proto.inputs
        )

    def outputs(self, function: str) -> tuple[str, ...]:
        """Names of a function's outputs, in order."""
        return tuple(feature.name for feature in self._description(function).output)

    def function(self, name: str) -> Function:
        """Read one function with its constants. Raises InputError naming the functions that exist."""
        return _FunctionReader(self, name, self._proto(name)).read()

    def _proto(self, function: str) -> Any:
        if function not in self.spec.mlProgram.functions:
            known = ", ".join(self.function_names)
            raise InputError(f"{self.path} has no function {function!r}", f"it has: {known}")
        return self.spec.mlProgram.functions[function]

    def _description(self, function: str) -> Any:
        """The message that describes the features of one function; single-function packages have one."""
        described = {description.name: description for description in self.spec.description.functions}
        return described.get(function, self.spec.description)

    def blob(self, file_name: str, offset: int, declared: Declared) -> Array:
        """A tensor from the weight file that the program calls `file_name`."""
        path = (self._model_file.parent / file_name.removeprefix("@model_path/")).resolve()
        if not path.is_relative_to(self.path.resolve()):
            raise UntrustedInput(f"{self.path} refers to a weight file outside itself: {file_name}")
        if path not in self._weights:
            self._weights[path] = WeightFile(path)
        return self._weights[path].read(offset, declared.dtype, _fixed_shape(declared))

    def _check_digests(self) -> None:
        for key, expected in self.metadata.items():
            if not key.startswith(DIGEST_KEY):
                continue
            file = self._model_file.parent / "weights" / Path(key.removeprefix(DIGEST_KEY)).name
            if not file.is_file() or sha256_of(file) != expected:
                raise InputError(
                    f"{file} is not the weight file that was exported (its SHA-256 differs)",
                    "the package is damaged or was changed; export or copy it again",
                )


class _FunctionReader:
    """Collects the operations and the constants of one function."""

    def __init__(self, package: Package, name: str, proto: Any) -> None:
        self._package = package
        self._name = name
        self._proto = proto
        self._constants: dict[str, tuple[Value, Declared]] = {}

    def read(self) -> Function:
        block = self._proto.block_specializations[self._proto.opset]
        return Function(
            name=self._name,
            inputs={value.name: _declared(value.type) for value in self._proto.inputs},
            outputs=tuple(block.outputs),
            operations=tuple(self._operations(block.operations)),
            constants=self._constants,
        )

    def _operations(self, protos: Any) -> Iterator[Operation]:
        for proto in protos:
            outputs = {output.name: _declared(output.type) for output in proto.outputs}
            first = next(iter(outputs), "")
            if proto.type == "const":
                self._store(first, proto.attributes["val"])
            else:
                yield Operation(proto.type, dict(self._arguments(proto, first)), outputs)

    def _arguments(self, proto: Any, output: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Names of all arguments; values written in place (and attributes, before iOS 18) get a name."""
        for parameter, value in proto.attributes.items():
            if parameter != "name":
                yield parameter, (self._store(f"{output}.{parameter}", value),)
        for parameter, argument in proto.inputs.items():
            yield (
                parameter,
                tuple(
                    binding.name or self._store(f"{output}.{parameter}.{i}", binding.value)
                    for i, binding in enumerate(argument.arguments)
                ),
            )

    def _store(self, name: str, value: Any) -> str:
        declared = _declared(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            self._constants[name] = self._package.blob(blob.fileName, blob.offset, declared), declared
        else:
            self._constants[name] = _immediate(value, declared), declared
        return name


def _model_file(package: Path) -> Path:
    """Path of the protobuf that the manifest calls the root model."""
    try:
        manifest = json.loads((package / "Manifest.json").read_bytes())
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{package} is not a Core ML package: Manifest.json: {error}") from error
    file: Path = (package / "Data" / item).resolve()
    if not file.is_relative_to(package.resolve()):
        raise UntrustedInput(f"{package} names a model outside itself: {item}")
    return file


def _parse(file: Path) -> Any:
    """The Model message in `file`, which must hold an ML program."""
    model, decode_error = _protobuf()
    try:
        model.ParseFromString(file.read_bytes())
    except (OSError, decode_error) as error:
        raise InputError(f"{file} is not a readable Core ML model: {error}") from error
    if model.WhichOneof("Type") != "mlProgram":
        raise InputError(f"{file} holds a {model.WhichOneof('Type')}, not an ML program")
    return model


def _protobuf() -> tuple[Any, type[Exception]]:
    """An empty Model message and the error its parser raises.

    coremltools' generated protobuf modules are imported under a name of ours, because importing
    coremltools itself takes seconds and pulls in torch where that is installed; this takes 0.1 s.
    """
    found = importlib.util.find_spec("coremltools")
    if found is None or not found.submodule_search_locations:
        raise MissingExtra("coremltools", "coreml")
    if _SCHEMA not in sys.modules:
        package = ModuleType(_SCHEMA)
        package.__path__ = [f"{folder}/proto" for folder in found.submodule_search_locations]
        sys.modules[_SCHEMA] = package
    schema = importlib.import_module(f"{_SCHEMA}.Model_pb2")
    return schema.Model(), importlib.import_module("google.protobuf.message").DecodeError


def import_coremltools(module: str = "coremltools") -> Any:
    """Import without its warnings of all that only macOS has. Raises MissingExtra if not installed."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("coremltools")
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra("coremltools", "coreml") from error
    finally:
        logger.setLevel(level)


def _declared(value_type: Any) -> Declared:
    """The declared type of a value; "" as dtype for lists and dictionaries."""
    if value_type.WhichOneof("type") != "tensorType":
        return Declared("")
    tensor = value_type.tensorType
    names = tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number
    dimensions = (dim.constant.size if dim.HasField("constant") else None for dim in tensor.dimensions)
    return Declared(names[tensor.dataType].name, tuple(dimensions))


def _fixed_shape(declared: Declared) -> tuple[int, ...]:
    if None in declared.shape:
        raise InputError("a stored tensor of the Core ML package has no fixed shape")
    return tuple(dim for dim in declared.shape if dim is not None)


def _immediate(value: Any, declared: Declared) -> Value:
    """A value written into the program itself: tensor, string, or list of strings or integers."""
    immediate = value.immediateValue
    if immediate.WhichOneof("value") == "list":
        return [_immediate(item, _declared(item.type)) for item in immediate.list.values]
    stored = immediate.tensor
    values = getattr(stored, stored.WhichOneof("value")).values
    if declared.dtype == "STRING":
        return str(values[0])
    shape = _fixed_shape(declared)
    if isinstance(values, bytes):
        return unpack(np.frombuffer(values, np.uint8), declared.dtype, math.prod(shape)).reshape(shape)
    return np.array(values, element_type(declared.dtype).container).reshape(shape)
