"""Run images through a program and watch what reaches each layer, one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vit_export.artifacts import Images, Layer, Program, Ranges
from vit_export.calibration.observers import ChannelStats, ObserverConfig, make_observer
from vit_export.errors import InputError, NumericsError

Progress = Callable[[int], None]  # called with the number of images done so far


class Watcher(Protocol):
    """What an observer and ChannelStats have in common."""

    def update(self, values: Tensor, where: str = ...) -> None:
        """Take in one batch's tensor."""


W = TypeVar("W", bound=Watcher)


def calibrate(
    program: Program,
    batches: Iterable[Images],
    config: ObserverConfig,
    *,
    progress: Progress | None = None,
) -> Ranges:
    """The range of each layer's input over all images, by the method of `config`.

    batches: float32 [n, 3, H, W], normalised; any n where the program's batch is dynamic.
    Layers that read the same tensor share one observer. Memory: one batch and the observers.

    Raises NumericsError naming the layer that NaN or Inf reaches first, InputError for no images or
    images of another size.
    """
    watchers, images = watch(program, batches, lambda layer: make_observer(config), progress=progress)
    chosen = {id(watcher): watcher.range() for watcher in watchers.values()}
    inputs = {name: chosen[id(watcher)] for name, watcher in watchers.items()}
    return Ranges(config.method, images, inputs)


def channel_statistics(
    program: Program, batches: Iterable[Images], *, progress: Progress | None = None
) -> dict[str, ChannelStats]:
    """The extremes of each input channel of each layer; same arguments and errors as `calibrate`."""
    axes = {"linear": -1, "conv": 1}
    return watch(program, batches, lambda layer: ChannelStats(axes[layer.kind]), progress=progress)[0]


def watch(
    program: Program,
    batches: Iterable[Images],
    make: Callable[[Layer], W],
    *,
    progress: Progress | None = None,
) -> tuple[dict[str, W], int]:
    """Show the input of each layer to the watcher that `make` gave for it; (watchers by layer, images).

    Layers of one kind with the same input node share a watcher.
    """
    interpreter = _Interpreter(program, make)
    done = 0
    with torch.inference_mode():
        for images in batches:
            for part in _fitting(program, images):
                interpreter.run(torch.from_numpy(part))
            done += len(images)
            if progress is not None:
                progress(done)
    if done == 0:
        raise InputError("there are no calibration images", "give at least one with --calib")
    return interpreter.watchers, done


class _Interpreter(Interpreter, Generic[W]):
    """Runs the graph, frees each tensor after its last use and shows layer inputs on the way."""

    def __init__(self, program: Program, make: Callable[[Layer], W]) -> None:
        super().__init__(program.graph)
        nodes = {node.name: node for node in program.graph.graph.nodes}
        self.watchers: dict[str, W] = {}  # by layer
        first: dict[tuple[Node, str], tuple[W, str]] = {}  # watcher and the first layer that reads it
        for layer in program.layers:
            source = nodes[layer.node].args[0]
            assert isinstance(source, Node)
            if (source, layer.kind) not in first:
                first[source, layer.kind] = make(layer), layer.name
            self.watchers[layer.name] = first[source, layer.kind][0]
        self._by_node: dict[Node, list[tuple[W, str]]] = {}
        for (source, _), reader in first.items():
            self._by_node.setdefault(source, []).append(reader)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        for watcher, name in self._by_node.get(n, ()):
            watcher.update(value, f"the input of {name}")
        if n.op == "output" and not torch.isfinite(value).all():
            raise NumericsError(
                "NaN or Inf at the output of the model", "look for an overflow in its last layers"
            )
        return value


def _fitting(program: Program, images: Images) -> Iterator[Images]:
    """The batch in pieces the program takes; with a fixed batch the last piece repeats its images."""
    if images.ndim != 4 or images.shape[2:] != program.image_size:
        asked = "x".join(map(str, program.image_size))
        raise InputError(f"calibration images are {list(images.shape)}", f"the model takes [N, 3, {asked}]")
    if program.dynamic_batch:
        yield images
        return
    for start in range(0, len(images), program.batch_size):
        part = images[start : start + program.batch_size]
        yield np.resize(part, (program.batch_size, *part.shape[1:]))
