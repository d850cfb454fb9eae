"""Reference interpreter for Core ML packages: numpy, on any machine, from the saved files.

It answers one question without a Mac: does the file that was written compute what the model computes? It
is not Apple's runtime and says nothing about its speed, placement or exact rounding. Its arithmetic: each
operation is computed in float32 from its inputs and its result is rounded once to the type the program
declares, so fp16 operations accumulate in float32 and round to nearest even; int8 values are exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_export.errors import InputError, RunnerError, UnsupportedOperator
from vit_export.runtime.mil_ops import KERNELS
from vit_export.runtime.mil_program import Declared, Feature, Function, Operation, Package
from vit_export.runtime.mil_shape_ops import SHAPE_OPS
from vit_export.runtime.mil_weights import Array, element_type

_VARIADIC = frozenset({"values"})  # parameters that take a tuple even when it has one element


class Interpreter:
    """Executes one function (default: the package's own default) of a saved .mlpackage.

    inputs, outputs: what `predict` takes and returns. operations: types in order, without constants.
    decompressed: result of each `constexpr_*` operation by name, float32 or integer.
    Raises InputError for damaged files, UnsupportedOperator naming an operation it does not have.

        >>> Interpreter(Path("vit.mlpackage")).predict({"image": pixels})   # doctest: +SKIP
        {'logits': array([[...]], dtype=float32)}
    """

    def __init__(self, path: Path | Package, function: str | None = None) -> None:
        package = path if isinstance(path, Package) else Package(path)
        program = package.function(function or package.function_names[0])
        self.function_names = package.function_names
        self.metadata = package.metadata
        self.inputs = package.inputs(program.name)
        self.outputs = program.outputs
        _check_supported(program.operations)
        self._declared = dict(_types(program))
        self._constants: dict[str, Any] = {
            name: _widened(value, declared) for name, (value, declared) in program.constants.items()
        }
        stored = [op for op in program.operations if op.kind.startswith("constexpr_")]
        for op in stored:
            self._constants.update(_execute(op, self._constants))
        self.decompressed: Mapping[str, Array] = {
            name: self._constants[name] for op in stored for name in op.outputs
        }
        self._steps = tuple(op for op in program.operations if op not in stored)
        self._finished = _last_uses(self._steps, keep={*self._constants, *self.outputs})

    @property
    def operations(self) -> tuple[str, ...]:
        """Types of the operations that `predict` executes, in order."""
        return tuple(step.kind for step in self._steps)

    def predict(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """Run once, as MLModel.predict of coremltools: names to arrays, or to a label and its scores.

        Images are uint8 [H, W, 3] or [1, H, W, 3], RGB; tensors have the declared shape.
        Raises InputError for features that do not fit, RunnerError if a result contradicts the program.
        """
        if set(features) != {feature.name for feature in self.inputs}:
            wanted = ", ".join(feature.name for feature in self.inputs)
            raise InputError(f"the Core ML package takes the inputs {wanted}, not {', '.join(features)}")
        values = dict(self._constants)
        values.update({feature.name: _fed(feature, features[feature.name]) for feature in self.inputs})
        with np.errstate(all="ignore"):  # an overflow to inf is fp16's answer and shows in the output
            for step, finished in zip(self._steps, self._finished, strict=True):
                values.update(_execute(step, values))
                for name in finished:
                    del values[name]
        return {name: _narrowed(values[name], self._declared[name]) for name in self.outputs}


def _execute(op: Operation, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of an operation's results, as the program declares them."""
    arguments: dict[str, Any] = {}
    for parameter, names in op.arguments.items():
        found = tuple(values[name] for name in names)
        arguments[parameter] = found if parameter in _VARIADIC else found[0]
    results = KERNELS[op.kind](**arguments)
    for (name, declared), result in zip(
        op.outputs.items(), results if len(op.outputs) > 1 else (results,), strict=True
    ):
        if declared.dtype in ("", "STRING"):
            yield name, result
            continue
        _check_shape(op.kind, name, declared, np.shape(result))
        moved = op.kind in SHAPE_OPS and declared.dtype == "FLOAT16"  # nothing to round
        yield name, result if moved else _widened(_narrowed(np.asarray(result), declared), declared)


def _narrowed(value: Any, declared: Declared) -> Any:
    """A value in the type that is declared for it."""
    if declared.dtype in ("", "STRING"):
        return value
    return np.asarray(value).astype(element_type(declared.dtype).container, copy=False)


def _widened(value: Any, declared: Declared) -> Any:
    """fp16 numbers as float32 (exact), in which kernels compute; scalars without their array."""
    if not isinstance(value, np.ndarray):
        return value
    wide = value.astype(np.float32) if declared.dtype == "FLOAT16" else value
    return wide[()] if wide.ndim == 0 else wide


def _fed(feature: Feature, given: Any) -> Array:
    """An input as the first operation sees it: images become NCHW float in the stated channel order."""
    value = np.asarray(given)
    if feature.colors:
        if value.dtype != np.uint8 or value.shape[-1:] != (3,):
            raise InputError(f"Core ML input {feature.name} is an image: uint8 [H, W, 3], not {value.dtype}")
        value = value.reshape(-1, *value.shape[-3:])[..., :: -1 if feature.colors == "BGR" else 1]
        value = value.transpose(0, 3, 1, 2)
    elif value.dtype != element_type(feature.declared.dtype).container:
        raise InputError(f"Core ML input {feature.name} is {feature.declared.dtype}, not {value.dtype}")
    if not _fits(value.shape, feature.declared):
        raise InputError(f"Core ML input {feature.name} is {_sizes(feature.declared)}, not {value.shape}")
    return np.asarray(_widened(_narrowed(value, feature.declared), feature.declared))


def _check_shape(kind: str, name: str, declared: Declared, shape: tuple[int, ...]) -> None:
    if not _fits(shape, declared):
        raise RunnerError(
            f"Core ML operation {kind} gave {list(shape)} for {name}, which is declared {_sizes(declared)}",
            "the package contradicts itself or the reference interpreter is wrong; please report it",
        )


def _fits(shape: tuple[int, ...], declared: Declared) -> bool:
    return len(shape) == len(declared.shape) and all(
        want in (None, size) for size, want in zip(shape, declared.shape, strict=True)
    )


def _sizes(declared: Declared) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in declared.shape)}]"


def _check_supported(operations: Iterable[Operation]) -> None:
    """Refuse before anything runs; names the operation and what it would write."""
    for op in operations:
        kernel, place = KERNELS.get(op.kind), next(iter(op.outputs), "nothing")
        if kernel is None:
            raise UnsupportedOperator(
                f"the Core ML reference interpreter has no operation {op.kind} (it writes {place})"
            )
        unknown = set(op.arguments) - set(inspect.signature(kernel).parameters)
        if unknown:
            raise UnsupportedOperator(
                f"the Core ML reference interpreter does not know {', '.join(sorted(unknown))} of {op.kind} "
                f"(it writes {place})"
            )


def _types(program: Function) -> Iterator[tuple[str, Declared]]:
    """Declared type of every value of a function."""
    yield from program.inputs.items()
    for op in program.operations:
        yield from op.outputs.items()
    for name, (_, declared) in program.constants.items():
        yield name, declared


def _last_uses(steps: tuple[Operation, ...], keep: set[str]) -> tuple[tuple[str, ...], ...]:
    """For each step the values that nothing needs after it, so that memory stays that of one layer."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        used = (name for names in step.arguments.values() for name in names)
        last.update({name: index for name in (*used, *step.outputs) if name not in keep})
    finished: list[list[str]] = [[] for _ in steps]
    for name, index in last.items():
        finished[index].append(name)
    return tuple(tuple(names) for names in finished)
