"""Real TensorRT-RTX builds of every family, and the numbers of the graphs they are built from.

Quick ones by default; `-m slow` runs the whole matrix: both precisions, free and fixed batch, native and
one other size.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from contracts.trt_models import FAMILIES, noise, outputs, program, quantized
from vit_export.artifacts import BuildRequest, BuiltArtifact, Precision, Preprocessing, Program
from vit_export.errors import TargetError, UsageError
from vit_export.export import onnx_graph
from vit_export.export.peaks import run_graph
from vit_export.export.targets.tensorrt_engine import TensorRtTarget
from vit_export.export.trt_build import rebuild
from vit_export.runtime.runner import open_runner

# The builder computes convolution scales in float32 whatever it is given, and says so.
_EXPECTED = {" (foreignNode) Converting conv activation scales to fp32.",
             " (foreignNode) Converting conv weight scales to fp32."}  # fmt: skip


traced = cache(program)


@cache
def source(family: str, size: int, precision: Precision) -> Program:
    return quantized(traced(family, size)) if precision is Precision.INT8 else traced(family, size)


def build(
    folder: Path, family: str, precision: Precision, size: int, batch: int | None, **options: object
) -> BuiltArtifact:
    request = BuildRequest(
        precision, folder, Preprocessing((size, size)), batch_size=batch,
        samples=noise(size, 2), options={"trt_flavor": "rtx", "trt_batches": (1, 2, 8), **options},
    )  # fmt: skip
    return TensorRtTarget().build(source(family, size, precision), request)


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    noise_power = ((reference.astype(np.float64) - other) ** 2).sum()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / noise_power))


def check(folder: Path, family: str, precision: Precision, size: int, batch: int | None) -> None:
    """Built by the real builder, no complaint about types, and the graph is right in ONNX Runtime."""
    judge(build(folder, family, precision, size, batch), family, batch)


def judge(artifact: BuiltArtifact, family: str, batch: int | None) -> None:
    precision, size, details = artifact.precision, artifact.image_size[0], artifact.details
    assert artifact.path.suffix == ".engine" and details["not_built"] == ""
    assert set(details["warnings"]) <= _EXPECTED
    assert details["compute_capabilities"] == ["8.6", "8.9", "12.0", "12.1"]
    images = noise(size, batch or 4)
    answer = run_graph(artifact.path.with_suffix(".onnx"), images, threads=1, rounded=True)
    expected = outputs(source(family, size, precision), images)
    # An int8 graph flips roundings when anything moves, so float16 costs it more than itself.
    assert sqnr_db(expected, answer) >= (55 if precision is Precision.FP16 else 20)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_int8_of_every_family(tmp_path, family):
    """Symmetric int8 in a float16 graph with a free batch builds for every family (ViT: TestGraph)."""
    check(tmp_path, family, Precision.INT8, FAMILIES[family][0][0], None)


def test_fp16(tmp_path):
    """A float16 graph builds and keeps 55 dB."""
    check(tmp_path, "deit", Precision.FP16, 64, None)


def test_fixed_batch(tmp_path):
    """A graph of batch 2 builds without a profile."""
    check(tmp_path, "deit", Precision.INT8, 64, 2)


def test_weights_beside_the_graph(tmp_path, monkeypatch):
    """What is too large for one protobuf has its weights in a file of their own, which the parser reads."""
    monkeypatch.setattr(onnx_graph, "_EXTERNAL_ABOVE", 1000)
    artifact = build(tmp_path, "deit", Precision.FP16, 64, 2)
    judge(artifact, "deit", 2)
    weights = (tmp_path / "model.onnx.data").stat().st_size
    assert weights > 10 * (tmp_path / "model.onnx").stat().st_size / 2
    (tmp_path / "model.onnx.data").write_bytes(b"")
    with pytest.raises(TargetError):
        rebuild(tmp_path / "model.trt.json", "rtx")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, 2], ids=["free", "fixed"])
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8])
@pytest.mark.parametrize(
    ("family", "size"), [(family, size) for family, (sizes, _) in FAMILIES.items() for size in sizes]
)
def test_the_whole_matrix(tmp_path, family, size, precision, batch):
    """Every family, native and one other size, FP16 and int8, free and fixed batch."""
    check(tmp_path, family, precision, size, batch)


class TestGraph:
    """What the graph of a ViT carries."""

    @pytest.fixture(scope="class")
    def built(self, tmp_path_factory) -> BuiltArtifact:
        return build(tmp_path_factory.mktemp("vit"), "vit", Precision.INT8, 64, None, int8_attention="off")

    def test_it_builds_and_is_right(self, built):
        """As for the other families."""
        judge(built, "vit", None)

    def test_everything_else_is_float16(self, built):
        """No float32 tensor but the input, the output and what the report lists."""
        graph = onnx.load(built.path.with_suffix(".onnx")).graph
        assert [i.type.tensor_type.elem_type for i in (*graph.input, *graph.output)] == [
            onnx.TensorProto.FLOAT
        ] * 2
        assert all(i.data_type != onnx.TensorProto.FLOAT for i in graph.initializer)
        assert built.details["kept_float32"] == {}

    def test_quantisation_is_symmetric(self, built):
        """Every zero point is an int8 zero and every bias is a float."""
        graph = onnx.load(built.path.with_suffix(".onnx")).graph
        constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
        pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        zero_points = [constants[n.input[2]] for n in pairs if len(n.input) > 2]
        assert pairs and all(z.dtype == np.int8 and not z.any() for z in zero_points)
        assert not any(a.dtype == np.int32 for a in constants.values())

    def test_the_manifest_knows_the_int8_layers(self, built):
        """All ten linears and convolutions of two blocks are listed for the engine inspector."""
        import json

        listed = json.loads(built.path.with_suffix(".trt.json").read_text())["int8_layers"]
        assert listed[0] == "patch_embed.proj" and listed[-1] == "head"
        assert set(listed) == {
            "patch_embed.proj", "head",
            *(f"blocks.{i}.{m}" for i in (0, 1) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        }  # fmt: skip

    def test_attention_is_tidy(self, built):
        """Between qkv and softmax there is one Mul and no shape arithmetic."""
        nodes = onnx.load(built.path.with_suffix(".onnx")).graph.node
        inside = [n.op_type for n in nodes if n.name.startswith("blocks.0.attn/")]
        assert "Shape" not in inside and "Concat" not in inside
        assert inside.count("Mul") == 1

    def test_the_graph_runs_where_the_engine_cannot(self, built, tmp_path):
        """`lowered` is the very graph, unoptimised and rounded, so numbers are known without a GPU."""
        runnable = TensorRtTarget().lowered(built, 1, tmp_path)
        rounded = run_graph(built.path.with_suffix(".onnx"), noise(64), threads=1, rounded=True)
        with open_runner(runnable) as runner:
            answer = runner.infer(noise(64))
        np.testing.assert_array_equal(answer, rounded)
        assert sqnr_db(outputs(source("vit", 64, Precision.INT8), noise(64)), answer) >= 20

    def test_commands_name_files_of_the_folder(self, built):
        """The artifact is built in a temporary folder that is renamed: no command may name that."""
        assert all(str(built.path.parent) not in line for line in built.details["commands"].values())

    def test_unknown_option_is_refused(self, tmp_path):
        """A misspelt target option is an error before anything is exported."""
        with pytest.raises(UsageError, match="trt_bathces"):
            build(tmp_path, "vit", Precision.INT8, 64, None, trt_bathces=(1, 1, 1))
