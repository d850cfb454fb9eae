"""A program that a search rewrote comes back from its files as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from contracts.small import small_vit
from vit_export.artifacts import Program
from vit_export.export import rewritten
from vit_export.export.bias import change_bias, change_constant
from vit_export.export.graph import Edit, like_its_input
from vit_export.export.onnx_graph import save, to_onnx
from vit_export.export.program import example, trace
from vit_export.export.targets.ort_model import OrtTarget


@pytest.fixture(scope="module")
def traced() -> Program:
    """A small ViT whose qkv has no bias."""
    return trace(small_vit(qkv_bias=False))


def rewrite(traced: Program) -> Program:
    """What searches do: other weights, a bias where there was none, another LayerNorm, scales of rounding,
    and calls of their own: outliers divided behind a GELU, a stream turned back."""
    edit = Edit.of(traced.graph)
    nodes = {node.name: node for node in edit.graph.nodes}
    layers = []
    for layer in traced.layers:
        change_constant(edit, nodes[layer.node], 1, lambda weight: weight * 1.5)
        layers.append(change_bias(edit, nodes[layer.node], layer, lambda bias: bias + 0.25))
    norm = next(edit.nodes(torch.ops.aten.layer_norm.default))
    change_constant(edit, norm, 2, lambda weight: weight / 2)
    for gelu in edit.nodes(torch.ops.aten.gelu.default):
        reader = next(iter(gelu.users))
        factor = edit.constant(f"{gelu.name}.divided", torch.rand(192) + 0.5, gelu.next)
        divided = like_its_input(edit.call(factor.next, torch.ops.aten.mul.Tensor, gelu, factor))
        reader.replace_input_with(gelu, divided)
    scales = {layers[1].weight: torch.rand(layers[1].shape[0])}
    return replace(traced, graph=edit.build(), layers=tuple(layers), weight_scales=scales)


def answers(graph: GraphModule) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = graph(example((32, 32), 2))
    return out


def test_it_comes_back_bit_for_bit(traced: Program, tmp_path: Path) -> None:
    """Outputs, layers, scales and the bytes of the ONNX file are those of the program that was saved."""
    made = rewrite(traced)
    assert not torch.equal(answers(made.graph), answers(traced.graph))
    assert any(a.bias != b.bias for a, b in zip(made.layers, traced.layers, strict=True))
    rewritten.save(made, traced, tmp_path)
    back = rewritten.load(traced, tmp_path)
    assert torch.equal(answers(back.graph), answers(made.graph))
    assert back.layers == made.layers
    assert back.weight_scales.keys() == made.weight_scales.keys()
    assert all(torch.equal(back.weight_scales[name], made.weight_scales[name]) for name in back.weight_scales)
    files = []
    for number, program in enumerate((made, back)):
        save(to_onnx(program, OrtTarget().profile("fp32", {})), tmp_path / f"{number}.onnx")  # type: ignore[arg-type]
        files.append((tmp_path / f"{number}.onnx").read_bytes())
    assert files[0] == files[1]


def test_a_program_that_nothing_changed_costs_nothing(traced: Program, tmp_path: Path) -> None:
    """Plain calibration keeps no weights, and gives the traced tensors back."""
    rewritten.save(traced, traced, tmp_path)
    assert (tmp_path / "weights.safetensors").stat().st_size < 100
    back = rewritten.load(traced, tmp_path)
    assert torch.equal(answers(back.graph), answers(traced.graph))
    assert back.layers == traced.layers
