"""The one way to run a built artifact: `Runner`, and the table that names each runtime's class.

A runtime is added with one module and one line in RUNNERS. Its class writes `_open` and `_infer`; the
public methods do the checks, so that a plug-in cannot forget them. SDKs are imported in `_open`.

    with open_runner(Runnable("onnx", Path("model.onnx"))) as runner:
        logits = runner.infer(images)          # float32 [N, 3, H, W] -> float32 [N, K]
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from vit_export.artifacts import Images, Logits, Runnable, Size
from vit_export.errors import InputError, MissingExtra, RunnerError, UsageError, VitExportError

if TYPE_CHECKING:
    from typing_extensions import Self

RUNNERS: Mapping[str, str] = {
    "pytorch": "vit_export.runtime.torch_runner:TorchRunner",
    "onnx": "vit_export.runtime.ort_runner:OrtRunner",
    "openvino": "vit_export.runtime.openvino_runner:OpenVinoRunner",
    "tensorrt": "vit_export.runtime.tensorrt_runner:TensorRTRunner",
    "coreml": "vit_export.runtime.coreml_runner:CoreMLRunner",
    "fake": "vit_export.runtime.fake_runner:FakeRunner",
}

WARMUP_SECONDS = 0.1  # five calls of a small model would leave the processor's clock low

Options = TypeVar("Options", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Signature:
    """What an opened artifact takes: float32 [batch, 3, height, width] under the name `input_name`.

    batch: the number of images it was built for, or None where any number works.
    """

    image_size: Size
    batch: int | None
    input_name: str = "images"

    def check_input(self, images: Images) -> None:
        """Raise RunnerError unless `images` is finite float32 [N >= 1, 3, H, W] of this image size."""
        expected = (3, *self.image_size)
        if images.dtype != np.float32:
            raise RunnerError(f"input {self.input_name} must be float32, got {images.dtype}")
        if images.ndim != 4 or images.shape[1:] != expected or len(images) == 0:
            want = "x".join(map(str, ("N", *expected)))
            raise RunnerError(f"input {self.input_name} must be {want} with N >= 1, got {images.shape}")
        if not np.isfinite(images).all():
            raise RunnerError(f"input {self.input_name} has NaN or Inf")

    def check_output(self, logits: Any, count: int) -> Logits:
        """Return `logits` if it is finite float32 [count, K >= 1], else raise RunnerError."""
        if not isinstance(logits, np.ndarray) or logits.dtype != np.float32:
            raise RunnerError(f"output must be a float32 array, got {getattr(logits, 'dtype', type(logits))}")
        if logits.ndim != 2 or logits.shape[0] != count or logits.shape[1] == 0:
            raise RunnerError(f"output must be {count}xK, got {'x'.join(map(str, logits.shape))}")
        if not np.isfinite(logits).all():
            bad = int((~np.isfinite(logits).all(axis=1)).sum())
            raise RunnerError(
                f"output has NaN or Inf for {bad} of {count} images",
                "half precision may have overflowed; try --fp32, or --keep-float for the layers involved",
            )
        return logits


class Runner(ABC):
    """Runs one built artifact. Use as a context manager; the SDK is imported on entry.

    A subclass sets `package` (its distribution on PyPI) and `extra` (ours that installs it) and writes
    `_open`, `_infer` and, if it holds anything to free, `_close`. Not thread-safe.
    """

    package: ClassVar[str]
    extra: ClassVar[str]
    needs_file: ClassVar[bool] = True

    def __init__(self, runnable: Runnable) -> None:
        self.runnable = runnable
        self._signature: Signature | None = None

    @property
    def signature(self) -> Signature:
        """Input size and batch of the opened artifact. Raises RunnerError before entry."""
        if self._signature is None:
            raise RunnerError(f"{type(self).__name__} is not open", "use it in a `with` block")
        return self._signature

    @property
    def version(self) -> str:
        """Runtime and version, as reports carry it: `onnxruntime 1.32.0`."""
        return f"{self.package} {importlib.metadata.version(self.package)}"

    def __enter__(self) -> Self:
        """Import the SDK and load the artifact.

        Raises InputError (no such file), MissingExtra (no SDK), UsageError (unknown option) or
        RunnerError (the runtime refused the artifact).
        """
        if self.needs_file and not self.runnable.path.exists():
            raise InputError(f"no artifact at {self.runnable.path}")
        try:
            self._signature = self._open()
        except BaseException as error:
            self._close()
            if isinstance(error, VitExportError) or not isinstance(error, Exception):
                raise
            raise self._refused("refused", error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signature = None
        self._close()

    def infer(self, images: Images, *, batch: int | None = None) -> Logits:
        """Run the artifact: float32 [N, 3, H, W] to float32 [N, K], checked before and after.

        batch: compute in steps of so many images (None: all at once). An artifact built for a fixed
        batch always uses its own. The last step is filled up with copies of the last image, whose
        rows are dropped, so that the runtime sees one shape only.
        Raises RunnerError on a wrong shape or dtype, NaN or Inf on either side, or a runtime failure.
        """
        signature = self.signature
        signature.check_input(images)
        count = len(images)
        step = signature.batch or batch or count
        parts = [self._run(_filled(images[i : i + step], step)) for i in range(0, count, step)]
        return np.concatenate(parts)[:count]

    def time(
        self,
        images: Images,
        *,
        warmup: int,
        runs: int,
        min_seconds: float = 0.0,
        max_seconds: float = float("inf"),
    ) -> npt.NDArray[np.int64]:
        """Nanoseconds of single calls on `images` (float32 [batch, 3, H, W]).

        Before them, at least `warmup` calls and WARMUP_SECONDS of them (none for 0).
        At least `runs` calls and `min_seconds` of them; `max_seconds`, of warm-up and calls alike, ends
        both early but never before one call. Only the runtime's call is timed, not the checks around
        it. Raises RunnerError, or UsageError if the artifact is built for another batch.
        """
        if self.signature.batch not in (None, len(images)):
            raise UsageError(f"this artifact takes batch {self.signature.batch}, asked for {len(images)}")
        self.infer(images)
        if warmup:
            self._timed(images, warmup, WARMUP_SECONDS, max_seconds)
        collecting = gc.isenabled()
        gc.disable()  # a collection inside a run would be our time, not the runtime's
        try:
            return np.asarray(self._timed(images, max(runs, 1), min_seconds, max_seconds), np.int64)
        finally:
            if collecting:
                gc.enable()

    def rate(self, images: Images, *, seconds: float) -> tuple[int, float]:
        """(calls, seconds): calls on `images` that ended in about `seconds`, at least two a stream.

        As many run at once as the runner has `streams`. Raises as `infer` does, for the first call.
        """
        if self.signature.batch not in (None, len(images)):
            raise UsageError(f"this artifact takes batch {self.signature.batch}, asked for {len(images)}")
        self.infer(images)
        began = time.perf_counter()
        calls = self._rate(images, began + seconds)
        return calls, time.perf_counter() - began

    @property
    def streams(self) -> int:
        """Calls that `rate` lets run at once."""
        return 1

    def _rate(self, images: Images, end: float) -> int:
        """Calls until `perf_counter` says `end`; how many."""
        calls = 0
        while calls < 2 or time.perf_counter() < end:
            self._infer(images)
            calls += 1
        return calls

    def details(self, images: Images) -> Mapping[str, Any]:
        """How the runtime runs the artifact, measured on `images` where that matters: JSON's own types, for
        the report. Nothing by default."""
        return {}

    def _timed(self, images: Images, runs: int, min_seconds: float, max_seconds: float) -> list[int]:
        """Times of calls until there are `runs` and `min_seconds` of them, or `max_seconds` are spent."""
        clock, infer = time.perf_counter_ns, self._infer
        times: list[int] = []
        began = clock()
        while True:
            spent = (clock() - began) * 1e-9
            if (len(times) >= runs and spent >= min_seconds) or (times and spent >= max_seconds):
                return times
            start = clock()
            infer(images)
            times.append(clock() - start)

    def _run(self, images: Images) -> Logits:
        """One call of the runtime with its output checked."""
        try:
            logits = self._infer(images)
        except VitExportError:
            raise
        except Exception as error:
            raise self._refused("failed on", error) from error
        return self.signature.check_output(logits, len(images))

    def _sdk(self, module: str) -> Any:
        """Import `module` of the SDK, or raise MissingExtra / RunnerError if it is absent / broken."""
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise MissingExtra(self.package, self.extra) from error
        except (ImportError, OSError) as error:
            raise RunnerError(f"{self.package} is installed but does not load: {_line(error)}") from error

    def _options(self, kind: type[Options]) -> Options:
        """`runnable.options` as a checked struct. Raises UsageError on an unknown or ill-typed option."""
        try:
            return msgspec.convert(dict(self.runnable.options), kind)
        except msgspec.ValidationError as error:
            raise UsageError(f"runner {self.runnable.runner}: {error}") from error

    def _take_session(self, metadata: str) -> None:
        """Take session options from the artifact's own metadata (JSON), where the runnable sets none."""
        try:
            stored = msgspec.json.decode(metadata, type=dict[str, Any]) if metadata else {}
        except msgspec.DecodeError as error:
            raise InputError(f"{self.runnable.path.name} names no readable session: {error}") from error
        self.runnable = replace(self.runnable, options={**stored, **self.runnable.options})

    def _refused(self, verb: str, error: Exception) -> RunnerError:
        return RunnerError(f"{self.package} {verb} {self.runnable.path.name}: {_line(error)}")

    @abstractmethod
    def _open(self) -> Signature:
        """Import the SDK, load `self.runnable` with its threads and options, and say what it takes."""

    @abstractmethod
    def _infer(self, images: Images) -> Logits:
        """One synchronous call: contiguous float32 [N, 3, H, W] to a float32 [N, K] array."""

    def _close(self) -> None:  # noqa: B027  (nothing to free is a valid answer)
        """Free what `_open` took; called even if `_open` did not finish."""


def open_runner(runnable: Runnable) -> Runner:
    """The runner a runnable asks for, not yet entered. Raises UsageError for a name not in RUNNERS."""
    try:
        module, _, name = RUNNERS[runnable.runner].partition(":")
    except KeyError:
        raise UsageError(f"unknown runner {runnable.runner!r}", f"one of {', '.join(RUNNERS)}") from None
    kind: type[Runner] = getattr(importlib.import_module(module), name)
    return kind(runnable)


def _filled(images: Images, batch: int) -> Images:
    """`images` as a contiguous array with its last image repeated until there are `batch` of them."""
    missing = batch - len(images)
    if missing:
        images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
    return np.ascontiguousarray(images)


def _line(error: BaseException) -> str:
    """The first line of a vendor's message that says something, with its type if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
