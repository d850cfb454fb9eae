"""The Core ML runner: the interpreter on this machine, Apple's runtime through stand-ins."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import coremltools as ct
import msgspec
import numpy as np
import pytest
import torch
from coremltools.models.compute_plan import MLComputePlan

from contracts.runner import RunnerContract
from contracts.tiny import SIZE, TinyVit
from vit_export.artifacts import EvalSet, Images, Logits, Preprocessing, Runnable, Size
from vit_export.errors import InputError, RunnerError, UntrustedInput
from vit_export.runtime import coreml_units
from vit_export.runtime.accuracy import compare
from vit_export.runtime.coreml_device import AppleModel, placement
from vit_export.runtime.coreml_runner import PREPROCESSING_KEY, REFERENCE, latency_reason
from vit_export.runtime.coreml_units import COMPUTE_UNITS
from vit_export.runtime.mil_program import DIGEST_KEY, Package
from vit_export.runtime.runner import open_runner

_spec = importlib.util.spec_from_file_location("fake_apple", Path(__file__).with_name("fake_apple.py"))
assert _spec is not None and _spec.loader is not None
fake_apple = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_apple)

CONTRACT = Preprocessing(SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CONTRACT_JSON = json.dumps(
    {"size": SIZE, "mean": CONTRACT.mean, "std": CONTRACT.std, "interpolation": "bicubic"}
)


@cache
def model() -> TinyVit:
    return TinyVit().eval()


def logits(images: Images) -> Logits:
    with torch.inference_mode():
        result: Logits = model()(torch.from_numpy(images)).numpy()
    return result


class Normalised(torch.nn.Module):
    """TinyVit behind its preprocessing: pixels 0..255 in."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model()
        scale = 1 / (255 * torch.tensor(CONTRACT.std))
        self.register_buffer("scale", scale.reshape(3, 1, 1))
        shift = -torch.tensor(CONTRACT.mean) / torch.tensor(CONTRACT.std)
        self.register_buffer("shift", shift.reshape(3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(pixels * self.scale + self.shift)
        return result


def convert(module: torch.nn.Module, path: Path, inputs: Any, batch: int = 1, **options: Any) -> Path:
    program = torch.export.export(module, (torch.zeros(batch, 3, *SIZE),)).run_decompositions({})
    converted = ct.convert(
        program,
        inputs=[inputs],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
        **{"outputs": [ct.TensorType("logits")], **options},
    )
    converted.user_defined_metadata[PREPROCESSING_KEY] = CONTRACT_JSON
    converted.save(str(path))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one.mlpackage (batch 1), two.mlpackage (batch 2), image.mlpackage and classes.mlpackage."""
    folder = tmp_path_factory.mktemp("coreml")
    tensor = ct.TensorType("images", (1, 3, *SIZE))
    convert(model(), folder / "one.mlpackage", tensor)
    convert(model(), folder / "two.mlpackage", ct.TensorType("images", (2, 3, *SIZE)), batch=2)
    convert(Normalised(), folder / "image.mlpackage", ct.ImageType("image", (1, 3, *SIZE)))
    labels = ct.ClassifierConfig([f"class {i}" for i in range(7)])
    convert(model(), folder / "classes.mlpackage", tensor, outputs=None, classifier_config=labels)
    return folder


class CoreMLContract(RunnerContract):
    """The contract as a package of fixed batch fulfils it."""

    sdk = "coremltools"
    tolerance = 1e-5
    backend = "reference"

    @pytest.fixture
    def runnable(self, folder: Path) -> Runnable:
        return Runnable("coreml", folder / "one.mlpackage", options={"backend": self.backend})

    @pytest.fixture
    def fixed(self, folder: Path) -> Runnable:
        return Runnable("coreml", folder / "two.mlpackage", options={"backend": self.backend})

    @pytest.fixture
    def size(self) -> Size:
        return SIZE

    @pytest.fixture
    def expected(self) -> Callable[[Images], Logits]:
        return logits

    def test_signature_tells_size_and_batch(self, runnable: Any, fixed: Any, size: Size) -> None:
        """An opened package knows its image size, and that its batch is the one it was built for."""
        for candidate, batch in ((runnable, 1), (fixed, 2)):
            with open_runner(candidate) as runner:
                assert (runner.signature.image_size, runner.signature.batch) == (size, batch)


class TestReferenceRunner(CoreMLContract):
    """The interpreter as a runner."""

    def test_times_single_calls(self, runnable: Any, fixed: Any, images: Images) -> None:
        """The interpreter is never timed: its time would pass for Core ML's."""
        with open_runner(runnable) as runner, pytest.raises(RunnerError, match="only measurable on a Mac"):
            runner.time(images[:1], warmup=0, runs=1)

    def test_version_names_the_runtime(self, runnable: Any) -> None:
        """Every report can see that this is not Apple's runtime."""
        with open_runner(runnable) as runner:
            assert runner.version == f"coremltools {ct.__version__}, {REFERENCE}"
            assert not runner.measurable

    def test_latency_reason(self, runnable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before anything is opened a pipeline can know that there will be no latency, and why."""
        assert REFERENCE in latency_reason(runnable)
        automatic = replace(runnable, options={})
        monkeypatch.setattr("sys.platform", "linux")
        assert latency_reason(automatic)
        monkeypatch.setattr("sys.platform", "darwin")
        assert latency_reason(automatic) == ""


class TestAppleRunner(CoreMLContract):
    """Apple's runtime as a runner, with stand-ins for what is on macOS only."""

    backend = "apple"

    @pytest.fixture(autouse=True)
    def apple(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        fake_apple.install(monkeypatch.setattr)
        monkeypatch.setenv("PYTHONPATH", fake_apple.site_folder(tmp_path / "site"))
        monkeypatch.setenv(fake_apple.LOG, str(tmp_path / "log"))
        return tmp_path / "log"

    @pytest.mark.parametrize("units", COMPUTE_UNITS)
    def test_loads_for_the_asked_compute_units(self, units: str, runnable: Any, apple: Path) -> None:
        """The compute units reach the framework; a package with one function is loaded without a name."""
        with open_runner(replace(runnable, options={"backend": "apple", "compute_units": units})) as runner:
            assert runner.version.endswith(units)
            assert runner.measurable
        assert apple.read_text().splitlines() == [f"load {units} None"]

    def test_compiled_copy_is_removed(self, runnable: Any) -> None:
        """The temporary .mlmodelc goes with the runner."""
        with open_runner(runnable) as runner:
            compiled = Path(runner._model._compiled)
            assert compiled.is_dir()
        assert not compiled.parent.exists()

    def test_images_are_given_as_pil(self, folder: Path, images: Images) -> None:
        """A package with an image input gets RGB images, and PyTorch's numbers come out."""
        pixels = np.random.default_rng(3).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
        normalised = CONTRACT.normalize(pixels)
        with open_runner(
            Runnable("coreml", folder / "image.mlpackage", options={"backend": "apple"})
        ) as runner:
            self.close(runner.infer(normalised), logits(normalised))

    def test_timing_converts_an_image_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Turning tensors back into images is not in the measured time, and never serves another array."""
        from vit_export.runtime import coreml_runner

        converted = []
        pixels = coreml_runner._pixels
        monkeypatch.setattr(coreml_runner, "_pixels", lambda x, c: (converted.append(1), pixels(x, c))[1])
        levels = np.random.default_rng(4).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
        first, second = (CONTRACT.normalize(levels[i : i + 1]) for i in range(2))
        with open_runner(
            Runnable("coreml", folder / "image.mlpackage", options={"backend": "apple"})
        ) as runner:
            runner.time(first, warmup=3, runs=20)
            assert len(converted) == 2  # the untimed check, then once for all timed calls
            for images in (second, first):
                np.testing.assert_allclose(runner.infer(images), logits(images), atol=1e-4)

    def test_placement(self, folder: Path) -> None:
        """Placement is shares of estimated cost over devices, without constants, from another process."""
        found = placement(folder / "one.mlpackage", "CPU_AND_NE")
        kinds = [op.kind for op in Package(folder / "one.mlpackage").function("main").operations]
        fast = sum(kind in ("linear", "conv") for kind in kinds)
        slow = len(kinds) - fast
        assert found.operations == {"neural engine": fast, "cpu": slow}
        assert found.cost["neural engine"] == pytest.approx(3 * fast / (3 * fast + slow))
        assert sum(found.cost.values()) == pytest.approx(1)
        assert found.compute_units == "CPU_AND_NE"
        assert found.load_seconds > 0

    def test_placement_failure_has_the_last_words(self, tmp_path: Path) -> None:
        """A planning process that fails is one RunnerError that quotes it."""
        with pytest.raises(RunnerError, match=r"could not plan none\.mlpackage for ALL[\s\S]*not a Core ML"):
            placement(tmp_path / "none.mlpackage", "ALL")

    def test_every_compute_unit_is_measured(
        self, folder: Path, tmp_path: Path, apple: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One row a choice of compute units; one that kills its process is a reason and stops no other."""
        monkeypatch.setenv(fake_apple.ABORT, "CPU_AND_GPU")
        pixels = np.random.default_rng(2).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
        np.save(tmp_path / "pixels.npy", pixels)
        data = EvalSet(tmp_path / "pixels.npy", CONTRACT, len(pixels))
        expected = logits(CONTRACT.normalize(pixels))
        runnable = Runnable("coreml", folder / "one.mlpackage", 1, {"backend": "apple"})
        monkeypatch.setattr(coreml_units, "COMPUTE_UNITS", ("CPU_AND_GPU", "CPU_AND_NE"))
        details, notes = coreml_units.profile(
            runnable, data, tmp_path, lambda outputs: compare(expected, outputs), 120
        )
        broken, row = msgspec.convert(details["compute_units"], tuple[coreml_units.UnitResult, ...])
        assert "SIGABRT" in notes[0] and "planned cost" in notes[1]
        assert (broken.compute_units, broken.latency, broken.accuracy) == ("CPU_AND_GPU", None, None)
        assert "SIGABRT" in broken.reason
        assert (row.compute_units, row.reason) == ("CPU_AND_NE", "")
        assert row.latency is not None and row.latency.runs >= 50
        assert row.accuracy is not None and row.accuracy.agreement == 1.0
        assert row.placement is not None and row.placement.compute_units == "CPU_AND_NE"
        calls = apple.read_text().splitlines()
        assert sum(line.startswith("predict") for line in calls) >= 3 + 10 + 50


def test_the_interpreter_has_no_compute_units(folder: Path, tmp_path: Path) -> None:
    """Where Apple's runtime is not, there is nothing to profile, and nothing is claimed."""
    data = EvalSet(tmp_path / "none.npy", CONTRACT, 1)
    runnable = Runnable("coreml", folder / "one.mlpackage", 1, {"backend": "reference"})
    assert coreml_units.profile(runnable, data, tmp_path, lambda outputs: compare(outputs, outputs), 1) == (
        {},
        (),
    )


def test_stand_ins_have_the_real_signatures() -> None:
    """What the stand-ins take is what coremltools 9 documents, parameter for parameter."""
    pairs = [
        (fake_apple.CompiledMLModel.__init__, ct.models.CompiledMLModel.__init__),
        (fake_apple.CompiledMLModel.predict, ct.models.CompiledMLModel.predict),
        (fake_apple.compile_model, ct.models.utils.compile_model),
        (fake_apple.MLComputePlan.load_from_path, MLComputePlan.load_from_path),
    ]
    pairs += [
        (getattr(fake_apple.MLComputePlan, name), getattr(MLComputePlan, name))
        for name in (
            "get_compute_device_usage_for_mlprogram_operation",
            "get_estimated_cost_for_mlprogram_operation",
        )
    ]
    for ours, theirs in pairs:
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_image_package_equals_the_contract_and_pytorch(folder: Path) -> None:
    """Normalised tensors turn back into the exact pixels they came from, all 256 levels of each channel."""
    levels = np.arange(3 * SIZE[0] * SIZE[1]) % 256
    pixels = levels.astype(np.uint8).reshape(1, *SIZE, 3)
    normalised = CONTRACT.normalize(pixels)
    with open_runner(
        Runnable("coreml", folder / "image.mlpackage", options={"backend": "reference"})
    ) as runner:
        seen = []
        predict = runner._model.predict
        runner._model.predict = lambda features: (seen.append(features["image"]), predict(features))[1]
        result = runner.infer(normalised)
    np.testing.assert_array_equal(seen[0], pixels)
    np.testing.assert_allclose(result, logits(normalised), rtol=1e-4, atol=1e-5)


def test_image_package_of_others_is_refused(folder: Path, tmp_path: Path) -> None:
    """An image input without a stored contract cannot be fed from tensors, and that is said."""
    other = ct.models.MLModel(str(folder / "image.mlpackage"), skip_model_load=True)
    del other.user_defined_metadata[PREPROCESSING_KEY]
    other.save(str(tmp_path / "other.mlpackage"))
    with pytest.raises(RunnerError, match="does not say how they are normalised"):
        open_runner(Runnable("coreml", tmp_path / "other.mlpackage")).__enter__()


def test_classifier_scores_are_its_logits(folder: Path) -> None:
    """A package whose only numbers are a classifier's scores gives them in the order of its labels."""
    images = np.random.default_rng(0).standard_normal((2, 3, *SIZE), dtype=np.float32)
    with open_runner(Runnable("coreml", folder / "classes.mlpackage")) as runner:
        np.testing.assert_allclose(runner.infer(images), logits(images), rtol=1e-4, atol=1e-5)


def test_unknown_output_and_function(folder: Path) -> None:
    """Options that name what the package does not have are refused with what it has."""
    path = folder / "one.mlpackage"
    images = np.zeros((1, 3, *SIZE), np.float32)
    boxes = open_runner(Runnable("coreml", path, options={"output": "boxes"}))
    with boxes as runner, pytest.raises(RunnerError, match=r"no output boxes[\s\S]*logits"):
        runner.infer(images)
    with pytest.raises(RunnerError, match="no function 'size_96'"):
        open_runner(Runnable("coreml", path, options={"function": "size_96"})).__enter__()


def test_damage_is_a_runner_error_and_escape_is_not(folder: Path, tmp_path: Path) -> None:
    """A flipped weight byte is refused like any broken artifact; a path out of the package stays exit 2."""
    broken = ct.models.MLModel(str(folder / "one.mlpackage"), skip_model_load=True)
    broken.user_defined_metadata[DIGEST_KEY + "weight.bin"] = "0" * 64
    broken.save(str(tmp_path / "broken.mlpackage"))
    with pytest.raises(RunnerError, match="SHA-256 differs"):
        open_runner(Runnable("coreml", tmp_path / "broken.mlpackage")).__enter__()
    manifest = tmp_path / "broken.mlpackage/Manifest.json"
    manifest.write_text(manifest.read_text().replace("com.apple.CoreML/model.mlmodel", "../../x"))
    with pytest.raises(UntrustedInput):
        open_runner(Runnable("coreml", tmp_path / "broken.mlpackage")).__enter__()
    assert issubclass(UntrustedInput, InputError)


def test_opening_imports_neither_coremltools_nor_torch(folder: Path) -> None:
    """A device without torch can check a package, and a worker starts in a fraction of a second."""
    code = (
        "import sys; from pathlib import Path; from vit_export.artifacts import Runnable;"
        "from vit_export.runtime.runner import open_runner;"
        f"open_runner(Runnable('coreml', Path({str(folder / 'one.mlpackage')!r}))).__enter__();"
        "sys.exit(', '.join({'coremltools', 'torch'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.macos
@pytest.mark.parametrize("units", COMPUTE_UNITS)
def test_on_a_real_mac(units: str, folder: Path) -> None:
    """Apple's runtime agrees with PyTorch on every choice of compute units, and says where it ran."""
    images = np.random.default_rng(0).standard_normal((4, 3, *SIZE), dtype=np.float32)
    options = {"backend": "apple", "compute_units": units}
    with open_runner(Runnable("coreml", folder / "one.mlpackage", options=options)) as runner:
        np.testing.assert_allclose(runner.infer(images), logits(images), rtol=0.05, atol=0.05)
        assert len(runner.time(images[:1], warmup=10, runs=50)) >= 50
        assert isinstance(runner._model, AppleModel)
    found = placement(folder / "one.mlpackage", units)
    assert sum(found.cost.values()) == pytest.approx(1, abs=1e-3)
