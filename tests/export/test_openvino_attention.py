"""Attention with as many queries as heads, which OpenVINO's fusion gets wrong, comes out right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm.models as zoo
import torch
from torch import nn

from contracts.families import images, randomize
from vit_export.artifacts import BuildRequest, LoadedModel, Precision, Preprocessing, Runnable, Size
from vit_export.build_size import export
from vit_export.export.onnx_graph import to_onnx
from vit_export.export.openvino_attention import keep_transposes_apart, spread_bias
from vit_export.export.program import trace
from vit_export.export.targets import target_named
from vit_export.models import LoadOptions
from vit_export.models.finish import finish
from vit_export.runtime.accuracy import sqnr_db
from vit_export.runtime.runner import open_runner

OPENVINO = target_named("openvino")


def vit(tokens: int = 4) -> nn.Module:
    """Queries, keys and values in one product; four heads."""
    size = (16, 4 * tokens)
    return zoo.VisionTransformer(
        img_size=size, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5,
        class_token=False, global_pool="avg",
    )  # fmt: skip


def swin() -> nn.Module:
    """Windows of 2x2 with a bias, four heads."""
    return zoo.SwinTransformer(
        img_size=32, patch_size=4, window_size=2, embed_dim=32, depths=(2, 2), num_heads=(4, 4), num_classes=5
    )


def pvt_v2() -> nn.Module:
    """Queries in a product of their own; the last stage has 2x2 tokens and four heads."""
    return zoo.PyramidVisionTransformerV2(
        num_classes=5, depths=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64), num_heads=(1, 2, 2, 4)
    )


def loaded(make: Callable[[], nn.Module], size: Size) -> LoadedModel:
    torch.manual_seed(0)
    module = make()
    randomize(module)
    return finish(module, family="own", preprocessing=Preprocessing(size), options=LoadOptions(), size=size)


MODELS = [(vit, (16, 16), 2), (swin, (32, 32), 4), (pvt_v2, (64, 64), 2)]


@pytest.mark.parametrize(("make", "size", "turned"), MODELS, ids=["vit", "swin", "pvt_v2"])
def test_as_many_queries_as_heads(
    make: Callable[[], nn.Module], size: Size, turned: int, tmp_path: Path
) -> None:
    """float32 is the module's answer, and bfloat16 is no further from it than its rounding is (40 dB)."""
    model = loaded(make, size)
    artifact = export(
        trace(model), None, OPENVINO, BuildRequest(Precision.FP32, tmp_path, model.preprocessing)
    )
    given = images(size)
    with torch.no_grad():
        expected = model.module(given).numpy()
    for rest, least in (("f32", 100.0), ("bf16", 40.0)):
        with open_runner(Runnable("openvino", artifact.path, 1, {"inference_precision": rest})) as runner:
            assert sqnr_db(expected, np.asarray(runner.infer(given.numpy()))) > least, rest


@pytest.mark.parametrize(("make", "size", "turned"), MODELS, ids=["vit", "swin", "pvt_v2"])
def test_only_such_attentions_are_rewritten(make: Callable[[], nn.Module], size: Size, turned: int) -> None:
    """The transposes of the result, and of queries that have one of their own; with six tokens none."""
    profile = OPENVINO.profile(Precision.FP32, {})
    graph = to_onnx(trace(loaded(make, size)), profile)
    assert keep_transposes_apart(graph) == turned
    assert keep_transposes_apart(graph) == 0
    assert keep_transposes_apart(to_onnx(trace(loaded(lambda: vit(6), (16, 24))), profile)) == 0


class Hiding(nn.Module):
    """One attention of seven queries whose last key is hidden by a constant [1, 1, 1, 7]."""

    img_size = (8, 56)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 96), nn.Linear(32, 5)
        self.register_buffer("hidden", torch.tensor([0.0] * 6 + [-100.0]).reshape(1, 1, 1, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.qkv(self.stem(x).flatten(2).transpose(1, 2))
        q, k, v = tokens.reshape(-1, 7, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / 4 + self.hidden).softmax(-1)
        return self.head((weights @ v).transpose(1, 2).reshape(-1, 7, 32)).mean(1)


def test_a_bias_of_one_row(tmp_path: Path) -> None:
    """It gets a row for each query; the answer is then right in bfloat16 too (rounding takes 40 dB)."""
    model = loaded(Hiding, (8, 56))
    program, given = trace(model), images((8, 56))
    graph = to_onnx(program, OPENVINO.profile(Precision.FP32, {}))
    assert (spread_bias(graph), spread_bias(graph)) == (1, 0)
    artifact = export(program, None, OPENVINO, BuildRequest(Precision.FP32, tmp_path, model.preprocessing))
    with torch.no_grad():
        expected = model.module(given).numpy()
    with open_runner(Runnable("openvino", artifact.path, 1, {"inference_precision": "bf16"})) as runner:
        assert sqnr_db(expected, np.asarray(runner.infer(given.numpy()))) > 40
