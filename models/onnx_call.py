"""How one ONNX node is evaluated: its inputs as torch tensors, or on the host where shapes are computed.

ONNX graphs compute shapes with the same operators as data. Whatever follows from shapes and small integer
constants alone stays a numpy array ("host"), with a symbolic batch kept as torch's SymInt inside an object
array, so that torch.export sees a reshape to `[batch, 197, 12, 64]` and no arithmetic on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vit_export.errors import UnsupportedOperator

Host: TypeAlias = npt.NDArray[Any]
Value: TypeAlias = Tensor | Host


@dataclass(frozen=True, slots=True)
class Call:
    """A node about to be evaluated.

    label: operator and name for messages. inputs: None where an optional input is absent.
    """

    label: str
    opset: int
    attributes: Mapping[str, Any]
    inputs: tuple[Value | None, ...]
    outputs: int = 1

    @property
    def on_host(self) -> bool:
        """Whether every input is a host value."""
        return all(not isinstance(value, Tensor) for value in self.inputs)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value; strings as str."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, index: int) -> bool:
        """Whether the optional input is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def tensor(self, index: int = 0) -> Tensor:
        """An input as a torch tensor."""
        value = self.inputs[index]
        assert value is not None
        return value if isinstance(value, Tensor) else as_tensor(value)

    def host(self, index: int) -> Host:
        """An input that must not depend on the images."""
        value = self.inputs[index]
        if isinstance(value, Tensor) or value is None:
            raise self.unsupported("its shape depends on the pixels")
        return value

    def ints(self, index: int) -> list[Any]:
        """A host input as a flat list of int or SymInt."""
        return [_plain(v) for v in self.host(index).reshape(-1)]

    def operands(self) -> list[Any]:
        """Inputs of an elementwise operator: arrays on the host, else tensors and plain numbers."""
        if self.on_host:
            return list(self.inputs)
        rank = max(v.ndim for v in self.inputs if isinstance(v, Tensor))
        return [_operand(value, rank) for value in self.inputs]

    def axes(self, index: int = 1) -> list[int] | None:
        """`axes` as an attribute (old opsets) or an input; None when absent."""
        if "axes" in self.attributes:
            return list(self.attributes["axes"])
        return [int(v) for v in self.ints(index)] if self.has(index) else None

    def unsupported(self, reason: str) -> UnsupportedOperator:
        """The error that names this node."""
        return UnsupportedOperator(f"{self.label} cannot be imported: {reason}")


def as_tensor(value: Host) -> Tensor:
    """A host value as a tensor; symbolic entries are not possible here."""
    return torch.from_numpy(np.array(value)) if value.dtype != object else torch.tensor(value.tolist())


def host_shape(shape: Sequence[Any]) -> Host:
    """Dimensions as a host value: int64, or objects when one is symbolic."""
    symbolic = any(not isinstance(d, int) for d in shape)
    array = np.empty(len(shape), dtype=object if symbolic else np.int64)
    array[:] = list(shape)
    return array


def _operand(value: Value | None, rank: int) -> Any:
    if value is None or isinstance(value, Tensor):
        return value
    if value.size == 1 and value.ndim <= rank:
        return _plain(value.reshape(-1)[0])
    return as_tensor(value)


def _plain(value: Any) -> Any:
    """numpy scalars as Python numbers, SymInt as it is."""
    return value.item() if isinstance(value, np.generic) else value
