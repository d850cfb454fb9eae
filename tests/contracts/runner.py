"""What every runner must do, whatever runs underneath. Subclass it and give the fixtures.

class TestOrtRunner(RunnerContract):
    sdk = "onnxruntime"

    @pytest.fixture
    def runnable(self, tiny): return Runnable("onnx", tiny.path("onnx"), threads=1)
    ...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vit_export.artifacts import EvalSet, Images, Logits, Preprocessing, Runnable, Size
from vit_export.errors import InputError, MissingExtra, RunnerError, UsageError
from vit_export.runtime.runner import Runner, open_runner
from vit_export.runtime.worker_client import Worker


class RunnerContract:
    """Tests that each runner passes. `sdk` is the module it imports (None if it needs none).
    `tolerance` is relative to the largest output.

    Fixtures to give: `runnable` (any batch), `fixed` (the same model for a batch of 2, or None if the
    runtime has no such thing), `size`, and `expected`, which maps float32 NCHW to the right outputs.
    """

    sdk: str | None
    reads_file = True
    tolerance = 1e-4

    @pytest.fixture
    def runnable(self) -> Runnable:
        raise NotImplementedError

    @pytest.fixture
    def fixed(self) -> Runnable | None:
        raise NotImplementedError

    @pytest.fixture
    def size(self) -> Size:
        raise NotImplementedError

    @pytest.fixture
    def expected(self) -> Callable[[Images], Logits]:
        raise NotImplementedError

    @pytest.fixture
    def images(self, size: Size) -> Images:
        """Five images of standard normal noise."""
        return np.random.default_rng(1).standard_normal((5, 3, *size), dtype=np.float32)

    def close(self, a: Logits, b: Logits) -> None:
        """Equal within the tolerance of the largest output."""
        np.testing.assert_allclose(a, b, atol=self.tolerance * float(np.abs(b).max()), rtol=0)

    def test_reproduces_the_model(self, runnable, images, expected):
        """The outputs are those of the source model, float32 [N, K]."""
        with open_runner(runnable) as runner:
            logits = runner.infer(images)
        assert logits.dtype == np.float32
        self.close(logits, expected(images))

    def test_signature_tells_size_and_batch(self, runnable, fixed, size):
        """An opened runner knows its image size and whether its batch is free."""
        with open_runner(runnable) as runner:
            assert (runner.signature.image_size, runner.signature.batch) == (size, None)
        if fixed is not None:
            with open_runner(fixed) as runner:
                assert (runner.signature.image_size, runner.signature.batch) == (size, 2)

    def test_same_input_same_output(self, runnable, images):
        """Two calls with one input agree to the bit, so differences between artifacts are theirs."""
        with open_runner(runnable) as runner:
            assert np.array_equal(runner.infer(images), runner.infer(images))

    @pytest.mark.parametrize("batch", [1, 2, 5, 8])
    def test_batch_size_does_not_change_the_answer(self, runnable, images, expected, batch):
        """Steps of any size, the last one filled up, give each image its own answer."""
        with open_runner(runnable) as runner:
            self.close(runner.infer(images, batch=batch), expected(images))

    def test_fixed_batch_takes_any_number(self, fixed, images, expected):
        """An artifact built for two images still answers five."""
        if fixed is None:
            pytest.skip("this runtime has no fixed batch")
        with open_runner(fixed) as runner:
            self.close(runner.infer(images), expected(images))

    def test_outputs_belong_to_the_caller(self, runnable, images, expected):
        """A later call does not write into an earlier result, nor any call into its input."""
        before = images.copy()
        with open_runner(runnable) as runner:
            first = runner.infer(images[:2])
            runner.infer(images[2:4])
        self.close(first, expected(images[:2]))
        assert np.array_equal(images, before)

    def test_bad_input_never_reaches_the_runtime(self, runnable, images, monkeypatch):
        """Wrong dtype, rank, channels, size, NaN, Inf and no image at all are refused before `_infer`."""
        spoiled = images.copy()
        spoiled[0, 0, 0, 0] = np.nan
        infinite = images.copy()
        infinite[-1, -1, -1, -1] = np.inf
        bad = [
            images.astype(np.float64), images.astype(np.float16), images[0], images[:, :2],
            images.transpose(0, 2, 3, 1), images[:, :, :-1], images[:0], spoiled, infinite,
        ]  # fmt: skip
        with open_runner(runnable) as runner:
            monkeypatch.setattr(runner, "_infer", lambda _: pytest.fail("the runtime was called"))
            for array in bad:
                with pytest.raises(RunnerError, match="input"):
                    runner.infer(array)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda logits: np.full_like(logits, np.nan),
            lambda logits: logits[:-1],
            lambda logits: logits.astype(np.float64),
            lambda logits: logits[:, :, None],
            lambda logits: logits.tolist(),
        ],
        ids=["nan", "one-short", "float64", "rank-3", "list"],
    )
    def test_impossible_output_is_refused(self, runnable, images, monkeypatch, spoil):
        """A runtime that returns NaN, another count, dtype or rank is not believed."""
        with open_runner(runnable) as runner:
            run = runner._infer
            monkeypatch.setattr(runner, "_infer", lambda batch: spoil(run(batch)))
            with pytest.raises(RunnerError, match="output"):
                runner.infer(images)

    def test_vendor_exceptions_become_one_line(self, runnable, images, monkeypatch):
        """What a runtime throws arrives as RunnerError that names runtime and file, in one line."""

        def fail(_: Images) -> Logits:
            raise ValueError("\n  device lost\nat 0x1234\n")

        with open_runner(runnable) as runner:
            monkeypatch.setattr(runner, "_infer", fail)
            with pytest.raises(RunnerError) as caught:
                runner.infer(images)
        message = caught.value.message
        assert "device lost" in message
        assert "\n" not in message
        assert runner.package in message
        assert runnable.path.name in message

    def test_missing_sdk_names_the_pip_command(self, runnable, monkeypatch):
        """Without the SDK the error is MissingExtra, exit code 3, with the command that installs it."""
        if self.sdk is None:
            pytest.skip("this runner needs no SDK")
        monkeypatch.setitem(sys.modules, self.sdk, None)
        with pytest.raises(MissingExtra) as caught:
            open_runner(runnable).__enter__()
        assert caught.value.exit_code == 3
        assert "pip install 'vit-export[" in caught.value.hint

    @pytest.mark.parametrize("content", [b"", b"not a model at all\n" * 100, b"\x08\x0a\x12\x04PK\x03\x04"])
    def test_damaged_file_is_refused(self, runnable, tmp_path, content):
        """A file that is no model of this kind gives RunnerError in one line, not a vendor's traceback."""
        if not self.reads_file:
            pytest.skip("this runner reads no file")
        path = tmp_path / f"damaged{runnable.path.suffix}"
        path.write_bytes(content)
        with pytest.raises(RunnerError) as caught:
            open_runner(replace(runnable, path=path)).__enter__()
        assert path.name in caught.value.message
        assert "\n" not in caught.value.message

    def test_absent_file_is_an_input_error(self, runnable, tmp_path):
        """A path to nothing is the user's mistake: InputError with the path."""
        if not self.reads_file:
            pytest.skip("this runner reads no file")
        with pytest.raises(InputError, match="absent"):
            open_runner(replace(runnable, path=tmp_path / "absent.bin")).__enter__()

    def test_unknown_option_is_refused(self, runnable):
        """A misspelt option is an error, never ignored."""
        with pytest.raises(UsageError, match="sped"):
            open_runner(replace(runnable, options={**runnable.options, "sped": "max"})).__enter__()

    def test_closed_runner_refuses_work(self, runnable, images):
        """Before entry and after exit there is nothing to run."""
        runner: Runner = open_runner(runnable)
        with pytest.raises(RunnerError, match="not open"):
            runner.infer(images)
        with runner:
            runner.infer(images)
        with pytest.raises(RunnerError, match="not open"):
            runner.infer(images)

    def test_times_single_calls(self, runnable, fixed, images):
        """`time` gives at least the runs asked for, each positive, and refuses a batch it cannot take."""
        with open_runner(runnable) as runner:
            ns = runner.time(images[:1], warmup=1, runs=4)
            assert len(ns) == 4
            assert (ns > 0).all()
            assert len(runner.time(images[:1], warmup=0, runs=10**9, max_seconds=0.01)) >= 1
        if fixed is not None:
            with open_runner(fixed) as runner, pytest.raises(UsageError, match="batch 2"):
                runner.time(images[:1], warmup=0, runs=1)

    def test_version_names_the_runtime(self, runnable):
        """Reports can say what ran: a name and a version."""
        with open_runner(runnable) as runner:
            name, _, version = runner.version.partition(" ")
        assert name
        assert version[0].isdigit()

    def test_same_answer_in_a_worker(self, runnable, size, expected, tmp_path: Path):
        """In a process of its own the runner gives the same outputs for the same pixels."""
        pixels = np.random.default_rng(2).integers(0, 256, (5, *size, 3), dtype=np.uint8)
        np.save(tmp_path / "pixels.npy", pixels)
        data = EvalSet(tmp_path / "pixels.npy", Preprocessing(size), len(pixels))
        with Worker(runnable, timeout=120) as worker:
            logits = worker.infer(data, tmp_path / "logits.npy", batch=2)
        self.close(np.asarray(logits), expected(data.preprocessing.normalize(pixels)))
