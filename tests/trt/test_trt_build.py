"""Building engines: for real with TensorRT-RTX, and through a fake TensorRT for what needs a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from contracts.trt_graphs import SIZE, linear_logits, save_linear
from vit_export import cli_options
from vit_export.artifacts import Runnable
from vit_export.errors import InputError, MissingExtra, TargetError, UntrustedInput, UsageError
from vit_export.export import trt_sdk
from vit_export.export.trt_build import build_engine, rebuild
from vit_export.export.trt_manifest import EngineBuild, GraphInput
from vit_export.export.trt_options import DEFAULT_CAPABILITIES, TensorRtOptions
from vit_export.runtime.runner import open_runner

RTX = TensorRtOptions(flavor="rtx", batches=(1, 4, 8))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return save_linear(tmp_path / "model.onnx", None)


@pytest.fixture
def tensorrt(fake_gpu: ModuleType) -> Iterator[ModuleType]:
    """The fake TensorRT, freshly imported and forgotten afterwards."""
    import tensorrt as fake

    trt_sdk._load.cache_clear()
    yield fake
    trt_sdk._load.cache_clear()


def build(graph: Path, options: TensorRtOptions) -> EngineBuild:
    return build_engine(graph, GraphInput.of(graph), options)


class TestRtx:
    """The real builder, without a GPU."""

    def test_builds_for_every_chip_the_api_names(self, graph):
        """An engine for 8.6, 8.9, 12.0 and 12.1; the chips of other products are listed, not dropped."""
        built = build(graph, RTX)
        assert built.engine is not None and built.engine.stat().st_size > 1000
        assert built.reason == ""
        assert built.capabilities == ("8.6", "8.9", "12.0", "12.1")
        assert set(built.capabilities) | set(built.unavailable) == set(DEFAULT_CAPABILITIES)
        assert "8.7" in built.unavailable
        assert built.warnings == ()

    def test_a_fixed_batch_needs_no_profile(self, tmp_path):
        """A graph of batch 2 builds as it is."""
        built = build(save_linear(tmp_path / "fixed.onnx", 2), RTX)
        assert built.engine is not None
        assert "Shapes" not in built.commands["TensorRT 11"]

    def test_no_timing_cache(self, graph):
        """RTX looks for a GPU as soon as it is given a timing cache, so it never is."""
        build(graph, RTX)
        assert not list(graph.parent.glob("*.timing"))

    def test_chips_it_does_not_know_are_refused(self, graph):
        """Asking RTX for Hopper alone names the chips it does build for."""
        with pytest.raises(UsageError, match=r"9\.0") as caught:
            build(graph, TensorRtOptions(flavor="rtx", compute_capabilities=("9.0",)))
        assert "8.6" in caught.value.hint and "12.0" in caught.value.hint

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (TensorRtOptions(flavor="rtx", version_compatible=True), "version-compatible"),
            (TensorRtOptions(flavor="rtx", dla_core=0), "DLA"),
        ],
    )
    def test_what_rtx_lacks_is_refused_early(self, graph, options, message):
        """Options of TensorRT that RTX cannot honour are usage errors, not late build failures."""
        with pytest.raises(UsageError, match=message):
            build(graph, options)

    @pytest.mark.parametrize(
        "options",
        [
            TensorRtOptions(flavor="rtx", workspace_mib=64, optimization_level=0, tf32=True),
            TensorRtOptions(flavor="rtx", compatibility="same", compute_capabilities=("8.9",)),
        ],
    )
    def test_other_options_are_taken(self, graph, options):
        """Workspace, optimisation level, TF32 and hardware compatibility reach the real builder."""
        assert build(graph, options).engine is not None

    def test_a_build_leaves_no_part_behind(self, graph):
        """Engine and manifest appear whole, under their own names."""
        build(graph, RTX)
        assert sorted(p.name for p in graph.parent.iterdir()) == [
            "model.engine",
            "model.onnx",
            "model.trt.json",
        ]


class TestTensorRt:
    """Plain TensorRT, faked: what is asked of its builder."""

    def test_strongly_typed_with_profile_and_without_tf32(self, tensorrt, graph):
        """The network is strongly typed, the profile is the batches', TF32 is off, layers are named."""
        built = build(graph, TensorRtOptions(batches=(1, 4, 8), workspace_mib=256))
        network, config = tensorrt.built[-1]
        assert network._flags == 1 << tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        assert config._profiles[0]._shapes == {"images": tuple((n, 3, *SIZE) for n in (1, 4, 8))}
        assert config._flags == set()
        assert config._limits == {tensorrt.MemoryPoolType.WORKSPACE: 256 << 20}
        assert config.profiling_verbosity is tensorrt.ProfilingVerbosity.DETAILED
        assert (built.module, built.version, built.capabilities) == ("tensorrt", "10.3.0", ())

    def test_the_timing_cache_is_kept_and_reused(self, tensorrt, graph):
        """A second build starts from the cache of the first, which lies beside the engine."""
        build(graph, TensorRtOptions())
        assert graph.with_suffix(".timing").read_bytes() == b"+timed"
        build(graph, TensorRtOptions())
        assert graph.with_suffix(".timing").read_bytes() == b"+timed+timed"

    def test_a_cache_of_another_gpu_is_replaced(self, tensorrt, graph):
        """TensorRT refuses a foreign cache; the build goes on with a new one."""
        graph.with_suffix(".timing").write_bytes(b"FOREIGN")
        build(graph, TensorRtOptions())
        assert graph.with_suffix(".timing").read_bytes() == b"+timed"

    def test_options_reach_the_config(self, tensorrt, graph):
        """Hardware and version compatibility, DLA with GPU fallback, optimisation level."""
        options = TensorRtOptions(
            compatibility="ampere+",
            version_compatible=True,
            dla_core=1,
            optimization_level=5,
            timing_cache=False,
        )
        build(graph, options)
        _, config = tensorrt.built[-1]
        assert config.hardware_compatibility_level is tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS
        assert config._flags == {tensorrt.BuilderFlag.VERSION_COMPATIBLE, tensorrt.BuilderFlag.GPU_FALLBACK}
        assert (config.default_device_type, config.DLA_core) == (tensorrt.DeviceType.DLA, 1)
        assert config.builder_optimization_level == 5
        assert not graph.with_suffix(".timing").exists()

    def test_what_this_version_lacks_is_named(self, tensorrt, graph):
        """10.3 has no `same` compatibility level and this board no third DLA core."""
        with pytest.raises(UsageError, match=r"10\.3\.0 has no hardware compatibility 'same'"):
            build(graph, TensorRtOptions(compatibility="same"))
        with pytest.raises(UsageError, match="2 DLA cores"):
            build(graph, TensorRtOptions(dla_core=2))

    def test_what_was_built_runs(self, tensorrt, graph):
        """Engine, manifest and runner fit together: the runner finds the SDK and the batches by itself."""
        built = build(graph, TensorRtOptions(batches=(1, 4, 8)))
        images = np.random.default_rng(0).standard_normal((11, 3, *SIZE), dtype=np.float32)
        with open_runner(Runnable("tensorrt", built.engine)) as runner:
            np.testing.assert_allclose(runner.infer(images), linear_logits(images), atol=1e-4)


class TestWithoutEngine:
    """Where no engine can be built."""

    def test_no_gpu_leaves_graph_and_manifest(self, tensorrt, monkeypatch, graph):
        """TensorRT without a GPU: no engine, a reason that names the next step, all commands."""
        monkeypatch.setattr(tensorrt, "no_gpu", True)
        built = build(graph, TensorRtOptions())
        assert built.engine is None
        assert "needs a GPU" in built.reason and "vit-export verify" in built.reason
        assert json.loads(built.manifest.read_text())["engine"] is None
        assert set(built.commands) == {"TensorRT 10", "TensorRT 11", "TensorRT-RTX"}

    def test_no_tensorrt_leaves_graph_and_manifest(self, monkeypatch, graph):
        """Preparing for a Jetson on a machine without TensorRT is no error."""
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        built = build(graph, TensorRtOptions(flavor="tensorrt"))
        assert built.engine is None and "not installed" in built.reason

    def test_asking_for_rtx_without_it_is_an_error(self, monkeypatch, graph):
        """RTX installs from PyPI, so its absence is answered with the command, not with half a result."""
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        trt_sdk._load.cache_clear()
        with pytest.raises(MissingExtra) as caught:
            build(graph, RTX)
        trt_sdk._load.cache_clear()
        assert caught.value.hint == "pip install 'vit-export[tensorrt-rtx]'"

    def test_the_device_builds_from_the_manifest(self, tensorrt, monkeypatch, graph, tmp_path):
        """A folder prepared without a GPU and copied elsewhere builds there with the same options."""
        monkeypatch.setattr(tensorrt, "no_gpu", True)
        prepared = build_engine(
            graph, GraphInput.of(graph), TensorRtOptions(batches=(1, 2, 4)), int8_layers=("head",)
        )
        device = tmp_path / "device"
        device.mkdir()
        for path in (graph, prepared.manifest):
            (device / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(tensorrt, "no_gpu", False)
        built = rebuild(device / prepared.manifest.name)
        assert built.engine == device / "model.engine"
        assert (built.options.batches, built.int8_layers) == ((1, 2, 4), ("head",))


def test_a_device_needs_no_exporter(tmp_path, graph):
    """Building from a manifest works in a process without torch, onnx, onnx-ir and ONNX Runtime."""
    import subprocess

    built = build(graph, RTX)
    absent = ("torch", "onnx", "onnx_ir", "onnxruntime", "timm")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "from pathlib import Path\nfrom vit_export.export.trt_build import rebuild\n"
        f"print(rebuild(Path({str(built.manifest)!r}), 'rtx').engine)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(built.engine), done.stderr


class TestHere:
    """Whether an engine can run on this machine."""

    class Driver:
        """libcuda with so many devices."""

        def __init__(self, devices: int, status: int = 0) -> None:
            self.devices, self.status = devices, status

        def cuInit(self, flags: int) -> int:
            return self.status

        def cuDeviceGetCount(self, count: object) -> int:
            count._obj.value = self.devices  # type: ignore[attr-defined]
            return 0

    @pytest.mark.parametrize(
        ("driver", "reason"),
        [
            (None, "no driver"),
            (Driver(0), "finds none"),
            (Driver(1, status=100), "finds none"),
            (Driver(1), ""),
        ],
    )
    def test_the_driver_is_asked(self, monkeypatch, driver, reason):
        """No driver, a driver without a GPU, one that fails, and one with a GPU."""

        def load(name: str) -> object:
            if driver is None:
                raise OSError(name)
            return driver

        monkeypatch.setattr(trt_sdk.ctypes, "CDLL", load)
        said = trt_sdk.why_not_here()
        assert reason in said and bool(said) is bool(reason)


class TestManifest:
    """What another machine may be given."""

    def test_it_says_everything_twice_over(self, graph):
        """Written JSON and the returned value agree, and a rebuild from it gives the same engine."""
        built = build(graph, RTX)
        data = json.loads(built.manifest.read_text())
        assert data["schema"] == "vit-export.tensorrt/1"
        assert (data["module"], data["version"]) == (built.module, built.version)
        assert data["commands"] == dict(built.commands)
        assert data["input"] == {"name": "images", "size": list(SIZE), "batch": None}
        again = rebuild(built.manifest, "rtx")
        assert again.options == built.options

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"graph": "../model.onnx"}, UntrustedInput),
            ({"graph": "/etc/passwd"}, UntrustedInput),
            ({"graph_sha256": "0" * 64}, InputError),
            ({"schema": "vit-export.tensorrt/2"}, InputError),
            ({"options": {"batches": "many"}}, InputError),
        ],
    )
    def test_a_changed_manifest_is_refused(self, graph, change, error):
        """Paths out of the folder, another graph, another schema and nonsense are refused before a build."""
        built = build(graph, RTX)
        data = json.loads(built.manifest.read_text())
        built.manifest.write_text(json.dumps({**data, **change}))
        with pytest.raises(error):
            rebuild(built.manifest, "rtx")

    def test_not_a_manifest(self, tmp_path):
        """A file that is no JSON is an input error, not a traceback."""
        (tmp_path / "x.trt.json").write_text("hello")
        with pytest.raises(InputError, match="not a TensorRT manifest"):
            rebuild(tmp_path / "x.trt.json")


class TestOptions:
    """What can be asked."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("8", (8, None)), ("1,8,32", (None, (1, 8, 32)))],
    )
    def test_batches(self, text, expected):
        """--batch-size N fixes the graph's batch; MIN,OPT,MAX is the profile of a dynamic one."""
        assert cli_options.batch(text) == expected

    @pytest.mark.parametrize("text", ["", "a", "1,2", "1,2,3,4", "-1", "1.5", "1,,2"])
    def test_no_batches(self, text):
        """Anything else is a usage error that shows the form."""
        with pytest.raises(UsageError, match="MIN,OPT,MAX"):
            cli_options.batch(text)

    def test_chips(self):
        """--trt-compute-capabilities lists GPUs as NVIDIA numbers them; anything else is a usage error."""
        assert cli_options.capabilities("8.6, 12.0") == ("8.6", "12.0")
        with pytest.raises(UsageError, match="sm_86"):
            cli_options.capabilities("sm_86")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"batches": (4, 2, 8)},
            {"batches": (0, 1, 1)},
            {"optimization_level": 6},
            {"workspace_mib": 0},
            {"flavor": "lite"},
            {"compatibility": "all"},
        ],
    )
    def test_impossible_options(self, wrong):
        """A profile out of order, a level, workspace, flavour or compatibility that does not exist."""
        with pytest.raises(UsageError):
            TensorRtOptions(**wrong)

    def test_commands_for_each_version(self, graph):
        """10 is told that the graph decides precision, 11 and RTX need not; none uses a removed flag."""
        options = TensorRtOptions(
            flavor="rtx", batches=(1, 8, 32), workspace_mib=512, compute_capabilities=("8.6", "12.0")
        )
        lines = build(graph, options).commands
        shapes = " ".join(f"--{w}Shapes=images:{n}x3x4x6" for w, n in (("min", 1), ("opt", 8), ("max", 32)))
        common = f"{shapes} --builderOptimizationLevel=3 --memPoolSize=workspace:512 --noTF32"
        files = "--onnx=model.onnx --saveEngine=model.engine"
        assert lines["TensorRT 10"] == (
            f"trtexec {files} --stronglyTyped {common} --timingCacheFile=model.timing --useCudaGraph"
        )
        assert (
            lines["TensorRT 11"] == f"trtexec {files} {common} --timingCacheFile=model.timing --useCudaGraph"
        )
        assert lines["TensorRT-RTX"] == f"tensorrt_rtx {files} {common} --computeCapabilities=86,120"
        removed = ("--fp16", "--int8", "--best", "--calib", "--workspace=")
        assert not any(flag in line for flag in removed for line in lines.values())


class TestInput:
    """What a graph may take."""

    def test_absent_file(self, tmp_path):
        """A path to nothing is the user's mistake."""
        with pytest.raises(InputError, match=r"absent\.onnx"):
            build_engine(tmp_path / "absent.onnx", GraphInput("images", SIZE), RTX)

    def test_no_onnx(self, tmp_path):
        """TensorRT parses any bytes as an empty network; that is noticed and said."""
        path = tmp_path / "noise.onnx"
        path.write_bytes(b"hello")
        with pytest.raises(TargetError, match="no network with one input and one output"):
            build_engine(path, GraphInput("images", SIZE), RTX)
