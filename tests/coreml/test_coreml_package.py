"""The Core ML target: what a package takes, gives, stores and says about itself."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import coremltools as ct
import numpy as np
import pytest
import torch
from torch import nn

from contracts.small import loaded, randomise, small_vit
from contracts.target import TargetContract
from contracts.tiny import TinyVit
from vit_export import __version__
from vit_export.artifacts import BuildRequest, BuiltArtifact, Precision, Preprocessing, Program
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan as make_plan
from vit_export.errors import InputError, TargetError, UnsupportedOperator, UsageError
from vit_export.export import coreml_graph, coreml_metadata
from vit_export.export.coreml_options import CoreMLOptions
from vit_export.export.program import trace
from vit_export.export.quantize import quantize
from vit_export.export.targets.coreml_package import CoreMLTarget
from vit_export.models import adapt
from vit_export.runtime import coreml_runner, mil_program
from vit_export.runtime.accuracy import sqnr_db
from vit_export.runtime.coreml_interpreter import Interpreter
from vit_export.runtime.mil_program import Package
from vit_export.runtime.runner import open_runner

TARGET = CoreMLTarget()
FP16, FP32, INT8 = Precision.FP16, Precision.FP32, Precision.INT8
CONTRACT = Preprocessing((32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
LABELS = tuple(f"class {i}" for i in range(10))
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
IMAGES = CONTRACT.normalize(PIXELS)


class TestCoreMLTarget(TargetContract):
    """The contract of every target."""

    name: ClassVar[str] = "coreml"
    floor: ClassVar[dict[Precision, float]] = {FP32: 100, FP16: 50, INT8: 25}


@cache
def model() -> nn.Module:
    """Wide enough that position tables and weights pass the threshold of compression."""
    return small_vit(embed_dim=128, num_heads=4, depth=1).module


@cache
def program() -> Program:
    return trace(replace(loaded(model(), (32, 32)), preprocessing=CONTRACT))


@cache
def quantised(activations: str = "asymmetric") -> Program:
    traced = program()
    images = CONTRACT.normalize(np.random.default_rng(1).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8))
    weights: Any = "int8" if activations == "float" else None
    plan = make_plan(calibrate(traced, [images], MinMaxConfig()), traced.layers, weights=weights)
    return quantize(traced, plan, TARGET.profile(INT8, asked(activations)))


def asked(activations: str) -> dict[str, str]:
    """The options that quantise activations so, or weights alone."""
    return {"weights": "int8"} if activations == "float" else {"coreml_activations": activations}


def build(
    folder: Path, precision: Precision = FP16, source: Program | None = None, **options: Any
) -> BuiltArtifact:
    chosen = source or (quantised() if precision is INT8 else program())
    metadata = {"model": "small-vit", "source": "tests"}
    return TARGET.build(chosen, BuildRequest(precision, folder, CONTRACT, metadata=metadata, options=options))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`build`, once for all tests that only read the package."""

    @cache
    def make(precision: Precision = FP16, **options: Any) -> BuiltArtifact:
        return build(tmp_path_factory.mktemp("package"), precision, **options)

    return make


def infer(artifact: BuiltArtifact, images: Any = IMAGES) -> Any:
    with open_runner(TARGET.runnable(artifact, 1)) as runner:
        return runner.infer(images)


@cache
def expected() -> Any:
    with torch.inference_mode():
        return model()(torch.from_numpy(IMAGES)).numpy()


def relative(reference: Any, result: Any) -> float:
    return float(np.abs(reference - result).max() / np.abs(reference).max())


@pytest.mark.parametrize(("precision", "limit"), [(FP32, 1e-5), (FP16, 5e-3)])
def test_image_input_is_the_contract_and_pytorch(precision: Precision, limit: float, built: Any) -> None:
    """uint8 RGB images give what PyTorch gives after `Preprocessing.normalize`, within fp16's rounding."""
    artifact = built(precision, coreml_input="image")
    interpreter = Interpreter(artifact.path)
    results = [interpreter.predict({"image": pixels})["logits"] for pixels in PIXELS]
    assert relative(expected(), np.concatenate(results)) < limit
    assert relative(expected(), infer(artifact)) < limit


def test_pixels_are_normalised_in_float32(built: Any) -> None:
    """In an FP16 package the normalisation alone is float32, so its result is the contract's to the bit."""
    function = Package(built(FP16, coreml_input="image").path).function("main")
    first = function.operations[:3]
    assert [op.kind for op in first] == ["mul", "add", "cast"]
    assert [declared.dtype for op in first for declared in op.outputs.values()] == [
        "FLOAT32",
        "FLOAT32",
        "FLOAT16",
    ]
    scale, shift = (function.constants[op.arguments["y"][0]][0] for op in first[:2])
    levels = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16) * np.ones((1, 3, 1, 1), np.float32)
    ours = CONTRACT.normalize(levels.astype(np.uint8).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(levels * scale + shift, ours)


@pytest.mark.parametrize("options", [{}, {"coreml_input": "image", "coreml_target": "iOS17"}])
def test_classifier(options: dict[str, str], built: Any) -> None:
    """With labels the package names the class, gives probabilities by label, and still its float32 logits."""
    artifact = built(FP16, labels=LABELS, **options)
    interpreter = Interpreter(artifact.path)
    given = {"image": PIXELS[0]} if options else {"images": IMAGES[:1]}
    outputs = interpreter.predict(given)
    assert outputs["classLabel"] == LABELS[int(expected()[0].argmax())]
    assert outputs["logits"].dtype == np.float32
    probabilities = torch.from_numpy(expected()[0]).softmax(0).numpy()
    scores = next(value for value in outputs.values() if isinstance(value, dict))
    assert tuple(scores) == LABELS
    np.testing.assert_allclose(list(scores.values()), probabilities, atol=5e-3)
    assert relative(expected(), infer(artifact)) < 5e-3


def test_labels_must_fit(tmp_path: Path) -> None:
    """As many labels as classes; a file holds one a line; each mistake is one clear error."""
    with pytest.raises(InputError, match="3 labels for a model with 10 classes"):
        build(tmp_path, labels=["a", "b", "c"])
    names = tmp_path / "names.txt"
    names.write_text("\n".join(LABELS) + "\n")
    assert CoreMLOptions.of({"labels": names}).labels == LABELS
    names.write_text("a\n\nb\n")
    with pytest.raises(InputError, match="no empty line"):
        CoreMLOptions.of({"labels": names})
    with pytest.raises(InputError, match="cannot read labels"):
        CoreMLOptions.of({"labels": tmp_path / "none.txt"})


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
def test_int8_weights_are_the_plans(target: str, tmp_path: Path) -> None:
    """The saved weights are the plan's integers and scales: with FP32 around them, bit for bit."""
    artifact = build(tmp_path, FP32, quantised("float"), coreml_target=target, weights="int8")
    stored = sorted(Interpreter(artifact.path).decompressed.values(), key=lambda value: value.tobytes())
    weights = coreml_graph.float_weights(quantised("float")).graph.state_dict()
    ours = [weights[layer.weight].numpy() for layer in program().layers]
    for mine, theirs in zip(sorted(ours, key=lambda value: value.tobytes()), stored, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_ios17_stores_weights_unsigned(built: Any) -> None:
    """No int8 reaches constexpr_affine_dequantize, where the GPU and Neural Engine misread it."""
    function = Package(built(INT8, coreml_target="iOS17").path).function("main")
    stored = [op for op in function.operations if op.kind.startswith("constexpr_")]
    assert {op.kind for op in stored} == {"constexpr_affine_dequantize"}
    for op in stored:
        assert function.constants[op.arguments["quantized_data"][0]][1].dtype == "UINT8"
        assert np.unique(function.constants[op.arguments["zero_point"][0]][0]).tolist() == [128]


def test_attention_is_one_operation_on_ios18(built: Any) -> None:
    """iOS 18 keeps scaled_dot_product_attention; iOS 17, which has none, gets its parts."""
    kinds = Interpreter(built().path).operations
    assert "scaled_dot_product_attention" in kinds and "softmax" not in kinds
    kinds = Interpreter(built(INT8, coreml_target="iOS17").path).operations
    assert "scaled_dot_product_attention" not in kinds and "softmax" in kinds


@pytest.mark.parametrize(("activations", "floor"), [("float", 30), ("asymmetric", 25), ("symmetric", 22)])
def test_activations_choose_what_is_quantised(activations: str, floor: float, tmp_path: Path) -> None:
    """Weights alone, or activations too, with or without a zero point."""
    artifact = build(tmp_path, INT8, quantised(activations), **asked(activations))
    function = Package(artifact.path).function("main")
    quantisers = [op for op in function.operations if op.kind == "quantize"]
    linears = sum(layer.kind == "linear" for layer in program().layers)
    assert len(quantisers) == (0 if activations == "float" else linears)
    points = [
        function.constants[op.arguments["zero_point"][0]][0]
        for op in quantisers
        if "zero_point" in op.arguments
    ]
    assert bool(points) is (activations == "asymmetric")
    loss = sqnr_db(expected(), infer(artifact))
    assert loss is not None and loss > floor


@pytest.mark.parametrize(
    ("bits", "precision", "target", "floor"),
    [(6, FP16, "iOS18", 22), (4, FP16, "iOS17", 12), (4, INT8, "iOS18", 12)],
)
def test_palettes(bits: int, precision: Precision, target: str, floor: float, built: Any) -> None:
    """4 and 6 bit weights: at most 2^bits values a palette, the activations' quantisation kept for int8."""
    artifact = built(precision, palettize=bits, coreml_target=target, coreml_input="image")
    function = Package(artifact.path).function("main")
    stored = [op for op in function.operations if op.kind.startswith("constexpr_")]
    assert {op.kind for op in stored} == {"constexpr_lut_to_dense"}
    for weight in Interpreter(artifact.path).decompressed.values():
        groups = weight.reshape(len(weight), -1)
        groups = groups.reshape(-1, 32 * groups.shape[1]) if target == "iOS18" else groups.reshape(1, -1)
        assert max(len(np.unique(group)) for group in groups) <= 2**bits
    kinds = {op.kind for op in function.operations}
    assert ("quantize" in kinds) is (precision is INT8)
    assert "batch_norm" not in kinds, "coremltools' inexact fusion came back with the second conversion"
    loss = sqnr_db(expected(), infer(artifact))
    assert loss is not None and loss > floor


def test_what_is_not_compressed_is_named(built: Any) -> None:
    """Details count compressed weights and name the rest: the small head, the position table and its use."""
    artifact = built(FP16, palettize=4, coreml_target="iOS17", coreml_input="image")
    details, (takes, compressed) = artifact.details, TARGET.notes(artifact)
    assert takes == "opens on iOS 17, macOS 14 and later, takes an RGB image, normalised inside"
    assert compressed.endswith(
        "weights have 4-bit palettes; left float: head; never compressed: pos_embed (feeds add)"
    )
    layers = {layer.name for layer in program().layers}
    assert details["weights"] == len(layers)
    assert details["float_weights"] == ("head",)
    assert details["compressed_weights"] == len(layers) - 1
    assert details["float_constants"] == {"pos_embed": "add"}


def test_fp32_stays_exact(tmp_path: Path) -> None:
    """With --palettize the FP32 package is what it always is: the one the others are compared with."""
    artifact = build(tmp_path, FP32, palettize=4)
    assert not Interpreter(artifact.path).decompressed
    assert relative(expected(), infer(artifact)) < 1e-5


def test_kept_float_layers_stay_float(tmp_path: Path) -> None:
    """A layer the plan keeps float is neither quantised nor hidden: it is in float_weights."""
    traced = program()
    plan = make_plan(
        calibrate(traced, [IMAGES], MinMaxConfig()), traced.layers, keep_float=["*.mlp.fc2", "head"]
    )
    details = build(tmp_path, INT8, quantize(traced, plan, TARGET.profile(INT8, {}))).details
    assert details["float_weights"] == ("blocks.0.mlp.fc2", "head", "patch_embed.proj")
    assert details["compressed_weights"] == details["weights"] - 3


def test_metadata(tmp_path: Path) -> None:
    """Author, licence, versions, contract and source are in the package, as are texts for each feature."""
    artifact = build(tmp_path, FP16, coreml_input="image", labels=LABELS, author="A. Author", license="MIT")
    description = Package(artifact.path).spec.description
    stored = description.metadata
    assert (stored.author, stored.license) == ("A. Author", "MIT")
    assert stored.versionString == f"vit-export {__version__}"
    assert stored.shortDescription == "small-vit, fp16"
    facts = dict(stored.userDefined)
    assert facts["vit_export.preprocessing_sha256"] == CONTRACT.digest()
    assert json.loads(facts["vit_export.preprocessing"])["mean"] == list(CONTRACT.mean)
    assert facts["vit_export.source"] == "tests"
    assert len(facts["vit_export.source_sha256"]) == len(facts["vit_export.sha256.weight.bin"]) == 64
    assert "com.github.apple.coremltools.version" in facts
    assert all(feature.shortDescription for feature in (*description.input, *description.output))
    assert "RGB image 32x32" in description.input[0].shortDescription


def test_source_digest_follows_the_weights(tmp_path: Path) -> None:
    """Another checkpoint has another source hash; the same one has the same."""
    other = trace(loaded(randomise(TinyVit(), 1), (16, 24)))
    request = BuildRequest(FP16, tmp_path, CONTRACT)
    first, second, third = (
        coreml_metadata.facts(source, request)["vit_export.source_sha256"]
        for source in (program(), other, program())
    )
    assert first == third != second


def test_same_inputs_give_the_same_bytes(built: Any, tmp_path: Path) -> None:
    """Two builds agree in every file and leave no debug file, so that bundles can be compared."""
    options = {"palettize": 4, "coreml_input": "image"}
    first, second = built(INT8, **options, coreml_target="iOS18").path, build(tmp_path, INT8, **options).path
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert len(files) == 3
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_coremltools_opens_what_was_sealed(built: Any) -> None:
    """After metadata and manifest were settled, coremltools still loads the package and its texts."""
    artifact = built(INT8, coreml_target="iOS17")
    opened = ct.models.MLModel(str(artifact.path), skip_model_load=True)
    assert opened.version == f"vit-export {__version__}"
    assert opened.user_defined_metadata["vit_export.precision"] == "int8"
    assert opened.get_spec().description.input[0].name == "images"


@pytest.mark.parametrize("precision", [pytest.param(FP16, marks=pytest.mark.slow), INT8])
def test_several_sizes_are_one_package(precision: Precision, tmp_path: Path) -> None:
    """Each size is a function with its own positions; equal weights are stored once; images work too."""
    source = replace(loaded(model(), (32, 32)), preprocessing=CONTRACT)
    plan = make_plan(calibrate(program(), [IMAGES], MinMaxConfig()), program().layers)
    artifacts, references = [], []
    for size in ((32, 32), (48, 32)):
        at = adapt(source, size)
        traced = trace(at)
        if precision is INT8:
            traced = quantize(traced, plan, TARGET.profile(INT8, {}))
        request = BuildRequest(
            precision, tmp_path / f"{size}", CONTRACT.at(size), options={"coreml_input": "image"}
        )
        artifacts.append(TARGET.build(traced, request))
        images = CONTRACT.normalize(np.random.default_rng(2).integers(0, 256, (2, *size, 3), dtype=np.uint8))
        with torch.inference_mode():
            references.append((images, traced.graph(torch.from_numpy(images)).numpy()))
    assert TARGET.shares(artifacts)
    together = TARGET.share(artifacts, tmp_path / "all")
    assert len({artifact.path for artifact in together}) == 1
    assert Interpreter(together[0].path).function_names == ("size_32x32", "size_48x32")
    assert together[0].size_bytes < 0.8 * sum(artifact.size_bytes for artifact in artifacts)
    for artifact, alone, (images, reference) in zip(together, artifacts, references, strict=True):
        np.testing.assert_array_equal(infer(artifact, images), infer(alone, images))
        assert relative(reference, infer(artifact, images)) < (5e-3 if precision is FP16 else 0.2)
    facts = Package(together[0].path).metadata
    assert json.loads(facts["vit_export.preprocessing.size_48x32"])["size"] == [48, 32]
    assert "vit_export.sha256.weight.bin" in facts


def test_sizes_that_cannot_share_stay_apart(built: Any) -> None:
    """Classifiers, iOS 17 and a single size keep their own: Core ML has no such package."""
    for artifact in (built(FP16, labels=LABELS), built(INT8, coreml_target="iOS17")):
        other = replace(artifact, image_size=(64, 64))
        assert not TARGET.shares([artifact, other])
    assert not TARGET.shares([built(FP16)])
    assert TARGET.shares([built(FP16), built(FP16)])


def test_wrong_options_are_usage_errors(tmp_path: Path) -> None:
    """Each option says what it can be; images come one at a time."""
    for options, words in (
        ({"coreml_target": "iOS12"}, "iOS17, iOS18"),
        ({"coreml_input": "video"}, "tensor, image"),
        ({"palettize": 5}, "0, 4, 6"),
        ({"coreml_activations": "int4"}, "asymmetric, symmetric"),
    ):
        with pytest.raises(UsageError) as caught:
            CoreMLOptions.of(options)
        assert words in caught.value.hint
    request = BuildRequest(FP16, tmp_path, CONTRACT, batch_size=2, options={"coreml_input": "image"})
    with pytest.raises(UsageError, match="has batch 1"):
        TARGET.build(program(), request)


def test_unsupported_operator_is_named_with_its_module(tmp_path: Path) -> None:
    """What coremltools cannot convert is told as the operator and the module that calls it."""

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0e(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 32)
            self.odd = Odd()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.odd(self.stem(x).flatten(1))
            return result

    with pytest.raises(UnsupportedOperator, match=r"does not take operator special_i0e of odd") as caught:
        build(tmp_path, FP16, trace(loaded(Net(), (32, 32), classes=4)))
    assert isinstance(caught.value, TargetError)
    assert not list(tmp_path.glob("*.mlpackage"))


def test_gaps_are_gaps_and_are_closed() -> None:
    """coremltools still refuses `alias` of timm's Swin as traced; folding leaves none (see coreml_gaps)."""
    import timm

    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=28, window_size=7, embed_dim=16, depths=(1,), num_heads=(2,)
    )
    raw = torch.export.export(swin.eval(), (torch.zeros(1, 3, 28, 28),)).run_decompositions({})
    with pytest.raises(NotImplementedError, match="alias"):
        ct.convert(raw, convert_to="mlprogram", skip_model_load=True)
    folded = trace(loaded(swin, (28, 28), classes=1000))
    assert not [node for node in folded.graph.graph.nodes if "alias" in str(node.target)]


def test_names_the_runtime_reads_are_those_written() -> None:
    """Exporter and runner, which share no code, agree on the metadata keys."""
    assert coreml_metadata.DIGEST_KEY == mil_program.DIGEST_KEY
    assert coreml_metadata.PREPROCESSING_KEY == coreml_runner.PREPROCESSING_KEY


def test_not_timed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from macOS there is a reason instead of a latency; on a Mac there is none."""
    monkeypatch.setattr("sys.platform", "linux")
    assert coreml_runner.REFERENCE in TARGET.not_timed()
    monkeypatch.setattr("sys.platform", "darwin")
    assert TARGET.not_timed() == ""
