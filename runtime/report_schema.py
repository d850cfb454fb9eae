"""The report: everything a run found out, as typed values that are also the JSON file's schema.

Fractions are in 0..1, drops in percentage points (positive is worse), times in milliseconds, sizes in
bytes, image sizes [height, width]. A value that was not measured is null. The JSON schema beside this
file, report.schema.json, is made from these types: `python -m vit_export.runtime.report_schema`.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from vit_export.artifacts import Accuracy, Decision, Latency, LayerSensitivity, Precision, Preprocessing, Size
from vit_export.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA: Literal["vit-export.report/1"] = "vit-export.report/1"
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")

Fraction = Annotated[float, Meta(ge=0, le=1)]
Points = Annotated[float, Meta(ge=-100, le=100)]
Count = Annotated[int, Meta(ge=0)]
Side = Annotated[int, Meta(ge=1)]
ImageSize = tuple[Side, Side]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Ids = npt.NDArray[np.int64]  # [N], one class index an image

_MAX_IDS = 10_000_000  # what a packed list may unfold to; a report is a file from elsewhere


class PackedIds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A class index for every image, small enough for a report: base64(zlib(little-endian int32))."""

    count: Annotated[int, Meta(ge=0, le=_MAX_IDS)]
    data: str

    @classmethod
    def pack(cls, ids: npt.ArrayLike) -> Self:
        """Pack [N] class indices (-1 for none)."""
        raw = np.ascontiguousarray(ids, "<i4")
        return cls(raw.size, base64.b64encode(zlib.compress(raw.tobytes(), 9)).decode())

    def unpack(self) -> Ids:
        """The [N] int64 indices. Raises InputError if the text is damaged or of another length."""
        try:
            inflate = zlib.decompressobj()
            raw = inflate.decompress(base64.b64decode(self.data, validate=True), 4 * self.count + 1)
        except (ValueError, zlib.error) as error:
            raise InputError(f"packed predictions are damaged: {error}") from error
        if len(raw) != 4 * self.count or not inflate.eof:
            raise InputError(f"packed predictions do not hold the {self.count} values they announce")
        return np.frombuffer(raw, "<i4").astype(np.int64)


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the report. A field this version does not know is an error, not ignored."""


class Environment(Part, frozen=True, kw_only=True):
    """Where it ran. cores: physical ones available; threads: given to each runtime."""

    os: str
    machine: str
    python: str
    cpu: str
    cores: Side
    threads: Count
    cpu_features: tuple[str, ...] = ()
    memory_bytes: Count | None = None
    versions: dict[str, str] = {}


class DeviceState(Part, frozen=True, kw_only=True):
    """One reading of a device. mhz, max_mhz: by clock; celsius: by sensor; milliwatts: by rail.

    throttle_events: counters since boot, of which only a change says something. throttled: what limits
    a clock now. unreadable: those of clock, power and temperature that the system does not expose.
    """

    board: str = ""
    power_mode: str = ""
    governor: str = ""
    mhz: dict[str, float] = {}
    max_mhz: dict[str, float] = {}
    celsius: dict[str, float] = {}
    milliwatts: dict[str, float] = {}
    throttle_events: dict[str, int] = {}
    throttled: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


class Device(Part, frozen=True, kw_only=True):
    """Where `verify` ran, read just before and just after its measurements.

    host: as it was named to --host, empty for this machine. bundle_sha256: of the bundle's manifest.
    throttled: what slowed it in between.
    """

    before: DeviceState
    after: DeviceState
    bundle_sha256: Sha256
    host: str = ""
    throttled: tuple[str, ...] = ()


class ModelInfo(Part, frozen=True, kw_only=True):
    """What was exported. macs: multiply-accumulates for one image, at the first image size."""

    spec: str
    family: str
    parameters: Count
    num_classes: Count
    source_image_size: ImageSize
    preprocessing: Preprocessing
    preprocessing_sha256: Sha256
    macs: Count | None = None
    notes: tuple[str, ...] = ()


class ImageData(Part, frozen=True, kw_only=True):
    """Images that calibration saw. skipped: files that could not be read."""

    path: str
    images: Count
    sha256: Sha256
    skipped: Count = 0


class EvalData(ImageData, frozen=True, kw_only=True):
    """Images that accuracy was measured on. labels: whether there are any; label_ids: which."""

    labels: bool
    label_ids: PackedIds | None = None


class Data(Part, frozen=True, kw_only=True):
    """calib: null if nothing was calibrated; eval: null if accuracy was not measured."""

    calib: ImageData | None = None
    eval: EvalData | None = None


class Baseline(Part, frozen=True, kw_only=True):
    """The FP32 source at one image size, against which everything is compared.

    reason: why its latency could not be measured; then no speed-up against it is known.
    """

    runtime: str
    precision: Precision
    image_size: ImageSize
    runtime_version: str = ""
    top1: Fraction | None = None
    top5: Fraction | None = None
    latency_ms: Latency | None = None
    reason: str = ""
    peak_rss_bytes: Count | None = None
    predictions: PackedIds | None = None
    roofline: Roofline | None = None

    @property
    def name(self) -> str:
        """`pytorch fp32 224x224`: what tables call it."""
        return f"{self.runtime} {self.precision} {self.image_size[0]}x{self.image_size[1]}"


class Gate(Part, frozen=True, kw_only=True):
    """One rule applied to one result. passed: null when it cannot be decided. reason: why, from `gate`."""

    rule: str
    value: float | None
    limit: float
    passed: bool | None
    reason: str = ""


class Ceilings(Part, frozen=True, kw_only=True):
    """GMAC/s that products of large matrices reached on this machine, by arithmetic; null: it has none."""

    runtime: str
    threads: Count
    fp32: float | None = None
    bf16: float | None = None
    int8: float | None = None


class Roofline(Part, frozen=True, kw_only=True):
    """Products a second of a measured latency. ceiling: the arithmetic whose ceiling `share` is a part of."""

    gmac_per_s: float
    ceiling: Literal["fp32", "bf16", "int8"]
    share: float | None = None


class TuningStep(Part, frozen=True, kw_only=True):
    """One option that --tune tried against the best before it. p50_ms: of a call with it; ratio: how many
    times faster; sqnr_db: against FP32 on the images it was judged by. note: why it was not taken."""

    choice: str
    option: str
    taken: bool
    p50_ms: float | None = None
    ratio: float | None = None
    sqnr_db: float | None = None
    note: str = ""


class ThroughputPoint(Part, frozen=True, kw_only=True):
    """Images a second of calls with `batch` images: one after the other, or as many `streams` at once."""

    mode: Literal["latency", "throughput"]
    threads: Side
    streams: Side
    batch: Side
    images_per_s: float


class StageCost(Part, frozen=True, kw_only=True):
    """What a stage of the run took. peak_rss_bytes: resident memory of vit-export and its children together
    (shared pages count in each), null where the system does not tell."""

    stage: str
    seconds: float
    peak_rss_bytes: Count | None = None


class StageLoss(Part, frozen=True, kw_only=True):
    """What one stage (resize, fp16, quantize, lower, runtime) cost against the stage before it."""

    stage: str
    sqnr_db: float | None
    agreement: Fraction | None


class Result(Part, frozen=True, kw_only=True):
    """One artifact. reason: why it was not run or failed. artifact: relative to the report's folder.

    details: facts of the build and of the runtime, which differ between targets. notes: those a user
    should know, in sentences. tuning, throughput: with --tune and --throughput.
    """

    target: str
    precision: Precision
    image_size: ImageSize
    status: Literal["ok", "not_run", "failed"]
    reason: str = ""
    artifact: str | None = None
    bytes: Count | None = None
    runtime_version: str | None = None
    latency_ms: Latency | None = None
    speedup: float | None = None
    speedup_vs_fp16: float | None = None
    roofline: Roofline | None = None
    tuning: tuple[TuningStep, ...] = ()
    throughput: tuple[ThroughputPoint, ...] = ()
    top1: Fraction | None = None
    top5: Fraction | None = None
    top1_drop: Points | None = None
    top1_drop_ci95: tuple[Points, Points] | None = None
    agreement: Fraction | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    kl: float | None = None
    images: Count = 0
    peak_rss_bytes: Count | None = None
    kept_float: tuple[str, ...] = ()
    float_fallback_ops: Count | None = None
    stages: tuple[StageLoss, ...] = ()
    details: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    predictions: PackedIds | None = None
    verdict: Literal["ship", "hold"] | None = None
    verdict_reason: str = ""
    gates: tuple[Gate, ...] = ()

    @property
    def name(self) -> str:
        """`onnx int8 224x224`: what tables, rules and messages call it."""
        return f"{self.target} {self.precision} {self.image_size[0]}x{self.image_size[1]}"

    @property
    def key(self) -> tuple[str, Precision, Size]:
        """What makes it the same artifact in another report."""
        return self.target, self.precision, self.image_size

    def with_accuracy(self, accuracy: Accuracy, predictions: npt.ArrayLike | None = None) -> Result:
        """This result with what `accuracy.compare` found and the predicted class of every image."""
        packed = None if predictions is None else PackedIds.pack(predictions)
        return msgspec.structs.replace(self, **asdict(accuracy), predictions=packed)


class Report(Part, frozen=True, kw_only=True):
    """One run of vit-export. more_baselines: those of further image sizes. device: set by `verify`.

    decisions, sensitivity: of the quantisation plan at the first image size.
    ceilings: what the processor can do, measured in this run; null where a sweep timed its rows on several.
    costs: of this run's stages, in order.
    reused: stages that were not run, because an interrupted run or the store had them.
    """

    created: Annotated[datetime, Meta(tz=True)]
    command: str
    environment: Environment
    model: ModelInfo
    data: Data
    baseline: Baseline
    more_baselines: tuple[Baseline, ...] = ()
    results: tuple[Result, ...] = ()
    decisions: tuple[Decision, ...] = ()
    sensitivity: tuple[LayerSensitivity, ...] = ()
    device: Device | None = None
    reused: tuple[str, ...] = ()
    ceilings: Ceilings | None = None
    costs: tuple[StageCost, ...] = ()
    schema: Literal["vit-export.report/1"] = SCHEMA

    def baseline_for(self, size: Size) -> Baseline | None:
        """The baseline at an image size, None if that size has none."""
        found = (b for b in (self.baseline, *self.more_baselines) if b.image_size == size)
        return next(found, None)


def encode(report: Report) -> bytes:
    """The report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report, enc_hook=plain), indent=2) + b"\n"


def decode(data: bytes) -> Report:
    """A report from JSON. Raises msgspec.ValidationError (wrong) or msgspec.DecodeError (not JSON)."""
    return msgspec.json.decode(data, type=Report)


def plain(value: Any) -> Any:
    """What builders put into `details` besides JSON's own types: numpy scalars and paths."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"a report cannot hold a {type(value).__name__}")


def json_schema() -> bytes:
    """The JSON schema (2020-12) of the report, as report.schema.json holds it."""
    schema: Mapping[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SCHEMA,
        **msgspec.json.schema(Report),
    }
    return msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_bytes(json_schema())
