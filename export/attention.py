"""Attention maps of a traced program: no hooks and no code for any family, only the graph.

An attention is a `scaled_dot_product_attention` node, or a softmax whose result is multiplied with values.
Its weights are computed while the graph runs, in float and in int8 side by side, and reduced at once: a
layer's [heads, queries, keys] never outlives the layer.

Rollout: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3: heads averaged, half
of the identity added for the residual connection, layers multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from vit_export.artifacts import ImageAttention, Images, LayerAttention, Program, Size
from vit_export.errors import TargetError
from vit_export.export.graph import aten, module_path

_FUSED = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)
_REACH = 10  # nodes between a softmax and its product: reshapes, dropout, a mixing of heads
_MOST_PREFIX = 8  # class, distillation and register tokens
_TINY = 1e-12

NONE_FOUND = "no attention found: neither scaled_dot_product_attention nor a softmax multiplied with values"


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of a graph. name: its module path, `path#2` for the second in one module."""

    name: str
    node: Node


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The weights at a site: [n, heads, queries, keys] where it sees whole images of a batch of n.

    Windows stand in the first dimension; a 3-D product joins it with the heads. shift: by how much the
    image was rolled before it was cut into windows, (rows, columns), as shifted windows do. first: the token
    that the first query is of, where only queries that are read were kept (export/tokens.py).
    """

    site: Site
    weights: Tensor
    shift: Size = (0, 0)
    first: int | None = None


def find_attention(graph: GraphModule) -> tuple[Site, ...]:
    """Every attention of a graph, in execution order."""
    sites: list[Site] = []
    seen: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.target is _FUSED or (node.target in _SOFTMAX and _over_keys(node) and _is_multiplied(node)):
            path = module_path(node).removesuffix(".softmax") or "attention"
            seen[path] = seen.get(path, 0) + 1
            sites.append(Site(path if seen[path] == 1 else f"{path}#{seen[path]}", node))
    return tuple(sites)


def _over_keys(node: Node) -> bool:
    value = node.meta.get("val")
    rank = value.ndim if isinstance(value, Tensor) else None
    return node.args[1] in (-1, None if rank is None else rank - 1) and rank != 2


def _is_multiplied(node: Node, reach: int = _REACH) -> bool:
    return reach > 0 and any(u.target in _PRODUCTS or _is_multiplied(u, reach - 1) for u in node.users)


def weights_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The softmax inside torch's scaled_dot_product_attention, with its arguments: [..., queries, keys]."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = (query @ key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.float().softmax(-1)


class Walk(Interpreter):
    """One run of a graph that stops at every attention."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph)
        self.sites = {site.node: site for site in find_attention(program.graph)}
        embeddings = (layer for layer in program.layers if layer.kind == "conv" and layer.shape[1] == 3)
        self._embedding = next((layer.node for layer in embeddings), "")
        self._shift: Size = (0, 0)
        self.patches: Size | None = None  # rows and columns of the first convolution's result, once it ran
        self.result: Tensor | None = None

    @torch.inference_mode()
    def attention(self, images: Tensor) -> Iterator[Seen]:
        """Each attention's weights in order for float32 [n, 3, H, W]; afterwards `result` is the output."""
        self.env, self.args_iter = {}, iter([images])
        for node in self.graph.nodes:
            self.env[node] = value = self.run_node(node)
            if node.name == self._embedding:
                self.patches = (int(value.shape[-2]), int(value.shape[-1]))
            if node.target is aten.roll.default and len(node.args[1]) == 2 and max(node.args[1]) <= 0:
                self._shift = node.args[1][0], node.args[1][1]
            if node in self.sites:
                args, kwargs = self.fetch_args_kwargs_from_env(node)
                weights = weights_of(*args, **kwargs) if node.target is _FUSED else value
                yield Seen(self.sites[node], weights, self._shift, _first_query(node))
                self._shift = 0, 0
            if node.op == "output":
                self.result = value
            for used in self.user_to_last_uses.get(node, ()):
                del self.env[used]


def _first_query(node: Node, reach: int = _REACH) -> int | None:
    """Where the queries of an attention were cut out of all tokens; None for those of all tokens."""
    while reach > 0 and node.args and isinstance(node.args[0], Node):
        node, reach = node.args[0], reach - 1
        if node.target is aten.slice.Tensor and len(node.args) > 2 and node.args[1] not in (-1, 0):
            return int(node.args[2])  # type: ignore[arg-type]
        if node.target is aten.layer_norm.default:
            return None
    return None


def attend(program: Program, quantized: Program | None, image: Images) -> ImageAttention:
    """The attention of one image, float32 [1, 3, H, W], in a program and in its quantised form.

    Raises TargetError for a graph without an attention.
    """
    images = torch.from_numpy(image)
    if not program.dynamic_batch:
        images = images.expand(program.batch_size, -1, -1, -1)
    one, other = Walk(program), Walk(quantized) if quantized else None
    if not one.sites:
        raise TargetError(NONE_FOUND)
    flows = Rollout(), Rollout()
    layers: list[LayerAttention] = []
    second = other.attention(images) if other else iter(())
    for seen, pair in zip_longest(one.attention(images), second):
        both = (seen.weights,) if pair is None else (seen.weights, pair.weights)
        layers.append(_layer(seen, both, len(images), one.patches))
        for flow, weights in zip(flows, both, strict=False):
            flow.add(_one_image(weights, len(images)), seen.first)
    maps = [flow.map(one.patches) for flow in flows[: 2 if other else 1]]
    return ImageAttention(
        tuple(layers),
        _first(one.result),
        _first(other.result) if other else None,
        maps[0],
        maps[1] if other else None,
        flows[0].reason if maps[0] is None else "",
    )


def _first(output: Tensor | None) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    assert output is not None
    return output[0].float().numpy()


def _layer(seen: Seen, both: tuple[Tensor, ...], batch: int, patches: Size | None) -> LayerAttention:
    shape = seen.weights.shape
    heads = int(shape[-3]) if len(shape) > 3 else int(shape[0]) // batch
    maps = [_map(each, batch, patches, seen.shift) for each in both]
    known = [each.numpy() for each in maps if each is not None]
    return LayerAttention(
        name=seen.site.name,
        heads=heads,
        queries=int(shape[-2]),
        keys=int(shape[-1]),
        query="class token"
        if _has_class(int(shape[-2]), int(shape[-1]), patches) and known
        else "mean of all tokens",
        grid=(known[0].shape[1], known[0].shape[2]) if known else None,
        float_maps=known[0] if known else None,
        int8_maps=known[1] if len(known) > 1 else None,
        kl=divergence(*both) if len(both) == 2 else None,
        reason="" if known else _why_not(seen.weights, batch),
    )


def _map(weights: Tensor, batch: int, patches: Size | None, shift: Size) -> Tensor | None:
    """[heads, rows, columns] of the first image, None where the tokens have no place in it."""
    whole = _one_image(weights, batch)
    if whole is None:
        return from_windows(weights[: len(weights) // batch], patches, shift)
    found = token_grid(whole.shape[-1], patches)
    if found is None:
        return None
    return class_row(whole, patches)[:, found[1] :].reshape(len(whole), *found[0])


def from_windows(weights: Tensor, patches: Size | None, shift: Size) -> Tensor | None:
    """[heads, rows, columns]: how much each token is looked at from inside its window; sums to 1 a head.

    weights: [windows, heads, n, n] in row-major order, square windows (Liu et al. 2021, Swin). None for
    windows that do not tile the patch grid or a whole fraction of it (padded ones, say).
    """
    windows, side = len(weights), math.isqrt(weights.shape[-1])
    grid = _grid(windows * weights.shape[-1], patches) if patches and weights.ndim == 4 else None
    if grid is None or side * side != weights.shape[-1] or grid[0] % side or grid[1] % side:
        return None
    seen = weights.mean(2).reshape(grid[0] // side, grid[1] // side, -1, side, side) / windows
    return seen.permute(2, 0, 3, 1, 4).reshape(-1, *grid).roll((-shift[0], -shift[1]), (1, 2))


def _one_image(weights: Tensor, batch: int) -> Tensor | None:
    """[heads, queries, keys] of the first image; None where windows stand in the place of images."""
    if weights.ndim == 3:
        return weights[: len(weights) // batch]
    return weights[0] if weights.ndim == 4 and len(weights) == batch else None


def _why_not(weights: Tensor, batch: int) -> str:
    if _one_image(weights, batch) is not None:
        return f"{weights.shape[-1]} tokens are no grid of the image"
    count, tokens = math.prod(weights.shape[:-3]) // batch, int(weights.shape[-2])
    return f"windowed attention: {count} windows of {tokens} tokens that do not tile the patch grid"


def class_row(weights: Tensor, patches: Size | None) -> Tensor:
    """[heads, keys]: how the class token (the first prefix token) looks at each token.

    weights: [heads, queries, keys]. Without prefix tokens the mean over all queries; a single query, as in
    attention pooling, speaks for itself.
    """
    return weights[:, 0] if _has_class(weights.shape[1], weights.shape[2], patches) else weights.mean(1)


def _has_class(queries: int, keys: int, patches: Size | None) -> bool:
    """Whether the first query is a class token; queries that nobody reads may be missing."""
    found = token_grid(max(queries, keys), patches)
    return queries == 1 or (found is not None and found[1] > 0)


def token_grid(tokens: int, patches: Size | None) -> tuple[Size, int] | None:
    """(grid, prefix tokens) of a token sequence: the patch grid, or a whole fraction of it.

    patches: rows and columns of the patch embedding; None when it is no convolution: then a square.

    >>> token_grid(201, (14, 14)), token_grid(49, (56, 56)), token_grid(7, (14, 14))
    (((14, 14), 5), ((7, 7), 0), None)
    """
    for prefix in range(_MOST_PREFIX + 1):
        grid = _grid(tokens - prefix, patches)
        if grid is not None:
            return grid, prefix
    return None


def _grid(count: int, patches: Size | None) -> Size | None:
    if count < 4:
        return None
    if patches is None:
        side = math.isqrt(count)
        return (side, side) if side * side == count else None
    for part in range(1, min(patches) + 1):
        grid = patches[0] // part, patches[1] // part
        if grid[0] * part == patches[0] and grid[1] * part == patches[1] and grid[0] * grid[1] == count:
            return grid
    return None


def divergence(weights: Tensor, other: Tensor) -> float:
    """Mean KL(weights || other) over all rows, in nats; both [..., queries, keys] with rows that sum to 1."""
    ratio = weights.clamp_min(_TINY).log() - other.clamp_min(_TINY).log()
    return max(0.0, float((weights * ratio).sum(-1).mean()))


class Rollout:
    """The product of the layers' attention. matrix: [tokens, tokens], rows sum to 1.

    After a layer with fewer queries, [queries, tokens]; nothing can follow it.
    """

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self.reason = ""

    def add(self, weights: Tensor | None, first: int | None = None) -> None:
        """One more layer, [heads, queries, keys]; None for a layer that does not see the whole image.

        first: the token that the first query is of, where only some have a query.
        """
        if self.reason:
            return
        if weights is None or (first is None and weights.shape[1] != weights.shape[2]):
            self.reason = "rollout needs layers in which every token can see every other"
        elif self.matrix is not None and len(self.matrix) != weights.shape[2]:
            counts = f"{len(self.matrix)} to {weights.shape[2]}"
            self.reason = f"rollout needs the same tokens in every layer, here they go from {counts}"
        else:
            same = torch.eye(weights.shape[2]).narrow(0, first or 0, weights.shape[1])
            step = 0.5 * (weights.mean(0) + same)
            self.matrix = step if self.matrix is None else step @ self.matrix

    def map(self, patches: Size | None) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
        """[rows, columns] of what reaches the class token (or, without one, all tokens) from each patch."""
        if self.reason or self.matrix is None:
            return None
        found = token_grid(self.matrix.shape[1], patches)
        if found is None:
            self.reason = f"{self.matrix.shape[1]} tokens are no grid of the image"
            return None
        row = class_row(self.matrix[None], patches)[0]
        return row[found[1] :].reshape(found[0]).numpy()
