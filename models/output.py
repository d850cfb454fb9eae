"""Finding the one [N, K] tensor in whatever a model's forward returns, and making it the result.

The module itself is changed, not wrapped: its `forward` on the instance takes the chosen part, so that
parameters keep their names and torch.export traces it like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vit_export.artifacts import Size
from vit_export.errors import InputError
from vit_export.models.geometry import show

# Names under which models return class scores, then those of image embeddings; the first present wins.
LOGITS = ("logits", "cls_logits", "scores", "predictions", "prediction", "preds", "pred", "out", "output")
EMBEDDINGS = (
    "pooler_output", "image_embeds", "image_features", "x_norm_clstoken", "embedding", "embeddings",
    "features", "last_hidden_state",
)  # fmt: skip
Pool = Literal["", "class token", "mean of tokens", "mean of pixels"]
_NOT_OUTPUTS = ("mask", "loss", "ids_restore", "attentions", "hidden_states", "reshaped_hidden_states")
_HEADS = {
    functional.linear, functional.softmax, functional.log_softmax, torch.softmax, torch.addmm, torch.sigmoid,
    torch.ops.aten.linear, torch.ops.aten.linear.default, torch.ops.aten.softmax, torch.ops.aten.softmax.int,
}  # fmt: skip
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls_pos")


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the output is in a forward's result, and how it becomes [N, K].

    path: keys and indices to follow. pool: nothing, the class token, or the mean over tokens or pixels.
    width: K. scores: whether these are class scores, by their name or by the layer they come from.
    """

    path: tuple[str | int, ...]
    pool: Pool
    width: int
    scores: bool
    words: str

    def take(self, result: Any) -> Tensor:
        """Follow the path and pool."""
        return pooled(self.pool, self.follow(result))

    def follow(self, result: Any) -> Tensor:
        """The tensor at the path."""
        for key in self.path:
            result = getattr(result, str(key)) if _has_field(result, key) else result[key]
        tensor: Tensor = result
        return tensor


def pooled(pool: Pool, tensor: Tensor) -> Tensor:
    """[N, T, C] or [N, C, H, W] as [N, C]; [N, K] as it is."""
    if pool == "class token":
        return tensor[:, 0]
    if pool == "mean of tokens":
        return tensor.mean(1)
    return tensor.mean((2, 3)) if pool == "mean of pixels" else tensor


def select_output(module: nn.Module, size: Size, batch: int = 2) -> Choice:
    """Run `module` once on zeros [batch, 3, H, W] and make its forward return one [N, K] tensor.

    Raises InputError when the module cannot run or returns nothing that looks like scores or features.
    """
    with _Heads() as heads:
        result = run(module, size, batch)
    choice = _choose(result, module, batch, heads)
    if isinstance(module, GraphModule):
        _take_in_graph(module, choice, result)
    elif choice.path or choice.pool:
        _take_in_forward(module, choice)
    return choice


class _Heads(TorchFunctionMode):
    """Remembers the [N, K] results of linear layers and softmax: class scores come straight out of one."""

    def __init__(self) -> None:
        super().__init__()
        self._results: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 2 and func in _HEADS:
            self._results.append(result)
        return result

    def made(self, tensor: Tensor) -> bool:
        """Whether `tensor` is one of them, or a sum or mean of several (distilled heads)."""
        if any(result is tensor for result in self._results):
            return True
        return sum(result.shape == tensor.shape for result in self._results) == 2


def run(module: nn.Module, size: Size, batch: int = 2) -> Any:
    """forward on zeros, float32 [batch, 3, H, W], without gradients. Raises InputError with the reason."""
    images = torch.zeros(batch, 3, *size)
    try:
        with torch.no_grad():
            return module(images)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{type(module).__name__} failed on an image of {show(size)}: {reason}",
            "its forward must take one float32 tensor [batch, 3, height, width]",
        ) from error


def _choose(result: Any, module: nn.Module, batch: int, heads: _Heads) -> Choice:
    found = [(path, t) for path, t in _tensors(result) if t.ndim in (2, 3, 4) and t.shape[0] == batch]
    if not found:
        raise InputError(
            f"{type(module).__name__} returns no [batch, classes] or feature tensor: {_shapes(result)}",
            "its forward must return scores [batch, classes] or features [batch, tokens, channels]",
        )
    path, tensor = min(found, key=lambda item: _rank(*item))
    pool = _pool(tensor, module)
    name = _name(path)
    named = path[-1] if path else ""
    scores = not pool and named not in EMBEDDINGS and (named == "logits" or heads.made(tensor))
    others = [_name(p) for p, _ in found if p != path]
    words = f"{pool} of {name}" if pool == "class token" else f"{pool} in {name}" if pool else name
    if others:
        words += f" (also returned: {', '.join(others)})"
    return Choice(path, pool, tensor.shape[-1] if tensor.ndim < 4 else tensor.shape[1], scores, words)


def _name(path: tuple[str | int, ...]) -> str:
    """`logits`, `item 0`, `heads.main`; `the returned tensor` for no path."""
    return ".".join(f"item {key}" if isinstance(key, int) else key for key in path) or "the returned tensor"


def _rank(path: tuple[str | int, ...], tensor: Tensor) -> tuple[int, int, int]:
    """Lower is better: a name of scores, then [N, K] over token maps, then a name of embeddings."""
    key = path[-1] if path else ""
    scores = LOGITS.index(str(key)) if key in LOGITS else len(LOGITS)
    feature = EMBEDDINGS.index(str(key)) if key in EMBEDDINGS else len(EMBEDDINGS)
    return (scores, tensor.ndim, feature)


def _pool(tensor: Tensor, module: nn.Module) -> Pool:
    if tensor.ndim == 2:
        return ""
    if tensor.ndim == 4:
        return "mean of pixels"
    named = (name.rsplit(".", 1)[-1] for name, _ in module.named_parameters())
    return "class token" if any(name in _CLASS_TOKENS for name in named) else "mean of tokens"


def _tensors(result: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """Every float tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield path, result
    elif isinstance(result, Mapping):
        for key, value in result.items():
            if key not in _NOT_OUTPUTS:
                yield from _tensors(value, (*path, key))
    elif is_dataclass(result):
        for item in fields(result):
            yield from _tensors(getattr(result, item.name), (*path, item.name))
    elif isinstance(result, tuple | list):
        names = getattr(result, "_fields", range(len(result)))
        for key, value in zip(names, result, strict=True):
            yield from _tensors(value, (*path, key))


def _has_field(result: Any, key: str | int) -> bool:
    return isinstance(key, str) and not isinstance(result, Mapping) and hasattr(result, key)


def _shapes(result: Any) -> str:
    shapes = [f"{'.'.join(map(str, path)) or 'output'} {list(t.shape)}" for path, t in _tensors(result)]
    return ", ".join(shapes) or type(result).__name__


def _take_in_forward(module: nn.Module, choice: Choice) -> None:
    # A bound method survives deepcopy: the copy's forward is bound to the copy.
    module._whole_forward = module.forward  # type: ignore[assignment]
    module._choice = choice  # type: ignore[assignment]
    module.forward = MethodType(_forward, module)


def _take_in_graph(module: GraphModule, choice: Choice, result: Any) -> None:
    """torch.export runs a graph's nodes, whatever `forward` its module has: so change the nodes."""
    leaves = tree_leaves(result)
    index = next(i for i, leaf in enumerate(leaves) if leaf is choice.follow(result))
    output = next(iter(module.graph.find_nodes(op="output")))
    node = tree_leaves(output.args[0])[index]
    with module.graph.inserting_before(output):
        if choice.pool:
            node = module.graph.call_function(pooled, (choice.pool, node))
        output.args = (node,)
    module.graph.set_codegen(CodeGen())  # one tensor in, one out: nothing to flatten
    module.graph.eliminate_dead_code()
    module.recompile()


def _forward(self: Any, images: Tensor) -> Tensor:
    return self._choice.take(self._whole_forward(images))  # type: ignore[no-any-return]
