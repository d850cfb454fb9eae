"""The TensorRT runner over a fake GPU: the contract of all runners, and what only this one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from contracts.runner import RunnerContract
from contracts.trt_graphs import CLASSES, SIZE, linear_logits
from vit_export.artifacts import EvalSet, Images, Logits, Preprocessing, Runnable, Size
from vit_export.errors import RunnerError
from vit_export.runtime.inference import predict
from vit_export.runtime.runner import open_runner
from vit_export.runtime.tensorrt_runner import TensorRTRunner
from vit_export.runtime.trt_cuda import CudaError, OutOfMemory

pytestmark = pytest.mark.usefixtures("fake_gpu")


@pytest.fixture
def images() -> Images:
    return np.random.default_rng(1).standard_normal((8, 3, *SIZE), dtype=np.float32)


def runnable_for(engine: Path, **options: object) -> Runnable:
    return Runnable("tensorrt", engine, options={"module": "tensorrt", **options})


def opened(engine: Path, **options: object) -> TensorRTRunner:
    runner = open_runner(runnable_for(engine, **options))
    assert isinstance(runner, TensorRTRunner)
    return runner


class TestTensorRTRunner(RunnerContract):
    sdk = "tensorrt"

    @pytest.fixture
    def runnable(self, make_engine) -> Runnable:
        return runnable_for(make_engine())

    @pytest.fixture
    def fixed(self, make_engine) -> Runnable:
        return runnable_for(make_engine(batches=None, batch=2))

    @pytest.fixture
    def size(self) -> Size:
        return SIZE

    @pytest.fixture
    def expected(self) -> Callable[[Images], Logits]:
        return linear_logits


class TestOrder:
    """What is enqueued, and when the host waits."""

    def test_a_call_copies_computes_copies_and_waits_once(self, fake_gpu, make_engine, images):
        """After the first call of a batch size: one copy in, one graph, one copy out, one wait."""
        with opened(make_engine()) as runner:
            runner.infer(images)
            fake_gpu.state.log.clear()
            runner.infer(images)
        order = ["copy to device", "cudaGraphLaunch", "copy to host", "cudaStreamSynchronize"]
        assert fake_gpu.state.log[:4] == order

    def test_capture_follows_a_plain_run(self, fake_gpu, make_engine, images):
        """A graph is captured only after the engine ran once for that batch, and only once."""
        with opened(make_engine()) as runner:
            fake_gpu.state.log.clear()
            runner.infer(images)
            runner.infer(images)
            log = [entry for entry in fake_gpu.state.log if entry.startswith(("execute", "cuda", "shape"))]
        assert log.count("cudaStreamBeginCapture") == 1
        first = log.index("execute")
        assert log[first : first + 4] == [
            "execute", "cudaStreamSynchronize", "cudaStreamBeginCapture", "execute",
        ]  # fmt: skip

    def test_a_new_batch_size_drops_the_graph(self, fake_gpu, make_engine, images):
        """A graph is valid only for the shape it was captured with: after a change it is captured anew."""
        with opened(make_engine()) as runner:
            runner.infer(images, batch=8)
            for batch in (4, 8):
                fake_gpu.state.log.clear()
                logits = runner.infer(images[:batch], batch=batch)
                assert fake_gpu.state.log.count("cudaStreamBeginCapture") == 1
                np.testing.assert_allclose(logits, linear_logits(images[:batch]), atol=1e-4)
            assert len(fake_gpu.state.graphs) == 1

    def test_without_graphs_every_call_enqueues(self, fake_gpu, make_engine, images):
        """cuda_graphs=False captures nothing and says so."""
        with opened(make_engine(), cuda_graphs=False) as runner:
            runner.infer(images)
            assert runner.facts().cuda_graph == "turned off"
        assert "cudaStreamBeginCapture" not in fake_gpu.state.log

    def test_everything_is_given_back(self, fake_gpu, make_engine, images):
        """Leaving frees device and pinned memory, streams, events and graphs."""
        with opened(make_engine()) as runner:
            runner.infer(images)
            assert fake_gpu.state.alive() > 0
        assert fake_gpu.state.alive() == 0


class TestShapes:
    """Batches against the engine's profile."""

    @pytest.mark.parametrize("count", [1, 3, 8, 20])
    def test_any_number_of_images(self, make_engine, count):
        """More images than the profile's max go in steps; fewer than its min are filled up."""
        images = np.random.default_rng(2).standard_normal((count, 3, *SIZE), dtype=np.float32)
        with opened(make_engine(batches=(2, 4, 8))) as runner:
            logits = runner.infer(images)
        np.testing.assert_allclose(logits, linear_logits(images), atol=1e-4)

    def test_equal_profile_is_a_fixed_batch(self, make_engine):
        """A profile whose min is its max takes that batch only, and the signature says so."""
        with opened(make_engine(batches=(4, 4, 4))) as runner:
            assert runner.signature.batch == 4

    def test_half_precision_output_is_refused(self, make_engine):
        """An engine of another tool with float16 I/O is refused before a buffer is read as float32."""
        with pytest.raises(RunnerError, match="not float32"), opened(make_engine(dtype="HALF")):
            pass


class TestFaults:
    """What goes wrong on a device."""

    def test_out_of_memory_says_what_to_do(self, fake_gpu, make_engine):
        """Too little device memory is OutOfMemory with a next step, and nothing stays allocated."""
        fake_gpu.state.limit = 1024
        with pytest.raises(OutOfMemory, match="MemoryAllocation") as caught, opened(make_engine()):
            pass
        assert "smaller batch" in caught.value.hint
        assert fake_gpu.state.alive() == 0

    @pytest.mark.parametrize(
        "call", ["cudaMallocHost", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaFree"]
    )
    def test_a_failing_call_is_named(self, fake_gpu, make_engine, call):
        """Any CUDA call that fails on entry is named with its status."""
        fake_gpu.state.fail[call] = fake_gpu.cudaError_t.cudaErrorNoDevice
        with pytest.raises(CudaError, match=f"{call} failed with cudaErrorNoDevice"), opened(make_engine()):
            pass

    def test_a_kernel_fault_shows_at_the_wait(self, fake_gpu, make_engine, images):
        """An illegal address in a kernel surfaces as an error of that call, not as wrong numbers."""
        with opened(make_engine()) as runner:
            runner.infer(images)
            fake_gpu.state.fail["cudaStreamSynchronize"] = fake_gpu.cudaError_t.cudaErrorIllegalAddress
            with pytest.raises(CudaError, match="IllegalAddress"):
                runner.infer(images)

    @pytest.mark.parametrize(
        "call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
    )
    def test_a_refused_capture_falls_back(self, fake_gpu, make_engine, images, call):
        """Without a CUDA graph the engine still answers, and the facts say why there is none."""
        fake_gpu.state.fail[call] = fake_gpu.cudaError_t.cudaErrorStreamCaptureUnsupported
        with opened(make_engine()) as runner:
            np.testing.assert_allclose(runner.infer(images), linear_logits(images), atol=1e-4)
            assert call in runner.facts().cuda_graph

    @pytest.mark.parametrize(
        ("refuse", "message"),
        [("context", "no execution context"), ("shape", "refused batch"), ("execute", "could not enqueue")],
    )
    def test_tensorrt_refusing_is_an_error(self, fake_gpu, make_engine, images, refuse, message):
        """False or None from TensorRT, which raises nothing, is never taken for success."""
        with pytest.raises(RunnerError, match=message), opened(make_engine(refuse=refuse)) as runner:
            runner.infer(images)
        assert fake_gpu.state.alive() == 0


class TestMeasure:
    """Where the time goes, and on what."""

    def test_compute_is_told_from_copies(self, fake_gpu, make_engine, images):
        """GPU times are those of the events around each part: a copy in, a kernel, a copy out."""
        with opened(make_engine()) as runner:
            times = runner.measure(images, warmup=1, runs=5)
        megabytes = images.nbytes / (1 << 20)
        assert times.compute.p50 == pytest.approx(fake_gpu.KERNEL_MS, abs=1e-5)
        assert times.to_device.p50 == pytest.approx(fake_gpu.COPY_MS_PER_MB * megabytes, abs=1e-5)
        out = 8 * CLASSES * 4 / (1 << 20)
        assert times.to_host.p50 == pytest.approx(fake_gpu.COPY_MS_PER_MB * out, abs=1e-5)
        assert times.host.runs == 5
        assert 0 < times.enqueue.p50 <= times.host.p50

    def test_facts_describe_device_and_memory(self, fake_gpu, make_engine, images):
        """Name, compute capability and the bytes of this engine's buffers at its largest batch."""
        with opened(make_engine()) as runner:
            runner.infer(images)
            facts = runner.facts()
        assert (facts.device.name, facts.device.capability, facts.device.integrated) == (
            "Fake Orin",
            (8, 7),
            True,
        )
        assert facts.memory_bytes == images.nbytes + 8 * CLASSES * 4
        assert facts.cuda_graph == ""
        assert facts.version == "tensorrt 10.3.0"

    def test_details_are_plain_data(self, make_engine, images):
        """What the report carries is JSON: the split of a call and the device, nested values included."""
        with opened(make_engine()) as runner:
            details = json.loads(json.dumps(runner.details(images)))
        assert details["device"]["capability"] == [8, 7]
        assert details["compute_ms"] == 3.0
        assert {"to_device_ms", "to_host_ms", "host_ms", "int8_fallbacks", "cuda_graph"} <= set(details)

    def test_the_report_gets_them(self, make_engine, tmp_path):
        """A prediction made in a worker brings the details along: GPU times, device and fallbacks."""
        pixels = tmp_path / "pixels.npy"
        np.save(pixels, np.zeros((3, *SIZE, 3), np.uint8))
        data = EvalSet(pixels=pixels, preprocessing=Preprocessing(SIZE), count=3)
        details = predict(runnable_for(make_engine()), data, tmp_path / "out.npy").details
        assert (details["compute_ms"], details["device"]["capability"]) == (3.0, [8, 7])
        assert details["int8_fallbacks"] == []

    def test_fallbacks_are_named_from_the_inspector(self, make_engine):
        """A module the manifest wants in int8 but whose layer reads float16 is reported by name."""
        layers = [
            {
                "Metadata": "[ONNX Layer: head/Gemm]",
                "Inputs": [{"Format/Datatype": "Half"}],
                "TacticName": "h",
            },
            {
                "Metadata": "[ONNX Layer: fc1/MatMul]",
                "Inputs": [{"Format/Datatype": "Int8"}],
                "TacticName": "i",
            },
        ]
        engine = make_engine(layers=layers)
        manifest = {"module": "tensorrt", "int8_layers": ["head", "fc1", "not.in.engine"]}
        engine.with_suffix(".trt.json").write_text(json.dumps(manifest))
        with opened(engine) as runner:
            assert runner.facts().int8_fallbacks == ("head",)


class TestManifest:
    """The JSON beside an engine."""

    def test_it_chooses_the_sdk(self, make_engine):
        """An engine made by TensorRT is opened by TensorRT although `auto` was asked."""
        engine = make_engine()
        engine.with_suffix(".trt.json").write_text(json.dumps({"module": "tensorrt"}))
        with open_runner(replace(runnable_for(engine), options={})) as runner:
            assert runner.version == "tensorrt 10.3.0"

    @pytest.mark.parametrize(
        ("options", "needs"),
        [
            ({"version_compatible": True}, {"engine_host_code_allowed": True}),
            ({"dla_core": 1}, {"DLA_core": 1}),
        ],
    )
    def test_it_prepares_the_runtime(self, make_engine, options, needs):
        """A version-compatible or DLA engine opens only in a runtime that was told before."""
        engine = make_engine(needs=needs)
        with pytest.raises(RunnerError, match="refused"), opened(engine):
            pass
        manifest = {"module": "tensorrt", "options": options}
        engine.with_suffix(".trt.json").write_text(json.dumps(manifest))
        with opened(engine) as runner:
            assert runner.signature.image_size == SIZE

    def test_a_refused_engine_names_its_builder(self, make_engine):
        """What cannot be opened says which version built it and how to build it here."""
        engine = make_engine()
        engine.write_text("no engine")
        engine.with_suffix(".trt.json").write_text(json.dumps({"module": "tensorrt", "version": "10.16.1"}))
        with pytest.raises(RunnerError, match="refused") as caught, opened(engine):
            pass
        assert "10.16.1" in caught.value.hint
