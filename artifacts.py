"""What the stages hand to each other: frozen values with shapes and units, no behaviour to speak of.

load → LoadedModel → adapt → LoadedModel → trace → Program → calibrate → Ranges → plan → QuantPlan
→ quantize → Program → build → BuiltArtifact → run → Latency, Accuracy → Result → Report

Images are RGB. `uint8 NHWC` holds resized and cropped pixels in 0..255, `float32 NCHW` what a network
takes. Sizes are (height, width) in pixels. This module imports no stage and no vendor SDK.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from vit_export.python310 import StrEnum

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

Size = tuple[int, int]
Pixels = npt.NDArray[np.uint8]  # [N, H, W, 3]
Images = npt.NDArray[np.float32]  # [N, 3, H, W]
Logits = npt.NDArray[np.float32]  # [N, K]; embeddings for a model without a classifier
Labels = npt.NDArray[np.int64]  # [N]
WeightsOnly = Literal["int8", "int4"]  # quantising weights alone


class Precision(StrEnum):
    """The precisions a user can ask for; the order is that of the report."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class Interpolation(StrEnum):
    """Image resampling, named as timm and Pillow name it."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class CropMode(StrEnum):
    """How a resized image becomes `size`: keep the aspect and crop, or squash to it."""

    CENTER = "center"
    SQUASH = "squash"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes the network's input; one for calibration, baseline and every artifact.

    size: (height, width) in pixels fed to the network.
    mean, std: per RGB channel on the 0..1 scale.
    crop_pct: the short side is resized to size / crop_pct before the centre crop.
    """

    size: Size
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = Interpolation.BICUBIC
    crop_pct: float = 1.0
    crop_mode: CropMode = CropMode.CENTER

    def at(self, size: Size) -> Preprocessing:
        """The same contract for another network input size."""
        return replace(self, size=size)

    def digest(self) -> str:
        """SHA-256 of the contract, as carried by reports, artifacts and bundles."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def normalize(self, pixels: Pixels) -> Images:
        """uint8 NHWC pixels to contiguous float32 NCHW: (pixels / 255 - mean) / std."""
        scale = (1.0 / (255.0 * np.asarray(self.std, np.float64))).astype(np.float32)
        shift = (-np.asarray(self.mean, np.float64) / np.asarray(self.std, np.float64)).astype(np.float32)
        images = pixels.astype(np.float32) * scale + shift
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


class Positions(StrEnum):
    """How a family encodes positions; decides what a new image size needs."""

    ABSOLUTE = "absolute table"
    RELATIVE = "relative bias"
    ROTARY = "rotary"
    NONE = "none"


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in eval mode whose forward maps float32 NCHW to one [N, K] tensor.

    module: its parameter names are the names in plans and reports (no wrapper prefix).
    preprocessing.size: the size the module takes now; source_image_size: the one it was made for.
    multiple: (height, width) steps that a size must be a multiple of.
    num_classes: 0 for a model without a classifier head (its output is an embedding).
    output: which part of the forward's result was taken, in words.
    notes: facts the user should know (what was resampled, which key was chosen).
    """

    module: nn.Module
    spec: str
    family: str
    preprocessing: Preprocessing
    num_classes: int
    source_image_size: Size
    multiple: Size
    positions: Positions
    output: str = "logits"
    baseline_path: Path | None = None  # an .onnx source: its float file is the baseline
    notes: tuple[str, ...] = ()

    @property
    def image_size(self) -> Size:
        """(height, width) the module takes now."""
        return self.preprocessing.size


@dataclass(frozen=True, slots=True)
class Layer:
    """One matrix product or convolution with a constant weight, found in a program.

    name: module path (`blocks.3.mlp.fc1`), unique; node: its node in the graph.
    weight, bias: fully qualified names in the graph module (bias None where there is none).
    shape: of the weight, [out, in] or [out, in, kh, kw].
    macs: multiply-accumulates for one image.
    """

    name: str
    kind: Literal["linear", "conv"]
    node: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    macs: int


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A traced model: an unlifted ATen graph whose one input is float32 [batch, 3, H, W].

    graph: owns its parameters under the source's names; treat as immutable (passes copy it).
    layers: what can be quantised, in execution order.
    attention_macs: MACs of one image in products of two activations.
    source: the model as traced, before any rewrite of ours; what the baseline runs.
    weight_scales: by weight name, the float32 [out] (or [out, groups]) scale whose multiples a weight was
    rounded to; other weights are rounded to the nearest multiple when they are quantised.
    """

    graph: GraphModule
    source: ExportedProgram
    layers: tuple[Layer, ...]
    image_size: Size
    dynamic_batch: bool
    batch_size: int = 1
    attention_macs: int = 0
    notes: tuple[str, ...] = ()
    weight_scales: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image, linears, convolutions and attention."""
        return self.attention_macs + sum(layer.macs for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Range:
    """Real values [low, high] that quantisation must cover; low <= high, both finite."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ranges:
    """What calibration saw at the input of each layer.

    inputs: layer name → range chosen by `method`; images: how many were seen.
    """

    method: str
    images: int
    inputs: Mapping[str, Range]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What happens to one layer: quantised with this input range, or kept float for this reason.

    group: neighbouring input columns of the weight that share a scale; 0 for one scale a row.
    """

    name: str
    quantized: bool
    input: Range | None = None
    weight_bits: int = 8
    group: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """One option a search looked at: what the network then answered on calibration images kept aside.

    sqnr_db, agreement: against the float network, None where nothing was judged.
    """

    choice: str
    option: str
    taken: bool
    sqnr_db: float | None = None
    agreement: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """What int8 costs one layer, by the network's output on calibration images kept aside.

    sqnr_alone_db: with this layer alone in int8; sqnr_without_db: with all but it. None: not measured, or no
    error. macs: multiply-accumulates of one image.
    """

    layer: str
    kind: Literal["linear", "conv"]
    macs: int
    sqnr_alone_db: float | None
    sqnr_without_db: float | None = None


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """Target-neutral decisions, saved as plan.json. A TargetProfile turns them into scales.

    weights_only: activations stay float, ranges are not used.
    decisions: how the search came to the network these ranges are of (equalised, rounded, corrected).
    sensitivity: of each layer, where it was measured.
    """

    method: str
    seed: int
    images: int
    layers: tuple[LayerPlan, ...]
    weights_only: bool = False
    decisions: tuple[Decision, ...] = ()
    sensitivity: tuple[LayerSensitivity, ...] = ()
    schema: str = "vit-export.plan/1"

    def kept_float(self) -> tuple[str, ...]:
        """Names of the layers that stay float."""
        return tuple(layer.name for layer in self.layers if not layer.quantized)


@dataclass(frozen=True, slots=True)
class TargetProfile:
    """What a target accepts. Nothing else differs between targets.

    activations: uint8 with any zero point, or int8 with zero point 0.
    attention: keep one fused attention operator, or decompose it.
    convolutions: float where the runtime has no integer kernel with a float output.
    rest: float type of everything that is not quantised.
    """

    activations: Literal["asymmetric", "symmetric"]
    opset: int
    attention: Literal["fused", "decomposed"]
    convolutions: Literal["int8", "float"] = "int8"
    rest: Literal["float32", "float16"] = "float32"


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What a target is asked to make out of a program.

    folder: exists, belongs to this artifact alone. batch_size: fixes the batch, None keeps it dynamic.
    ranges: calibrated input ranges, where they are known. metadata: strings for the artifact's own
    metadata. options: the target's own, as named on the command line. samples: a few images, for targets
    that look at the numbers inside the lowered graph; samples_are: what they are, `8 calibration images`.
    timeout: seconds a vendor's step may take.
    """

    precision: Precision
    folder: Path
    preprocessing: Preprocessing
    opset: int | None = None
    batch_size: int | None = None
    ranges: Ranges | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: Images | None = None
    samples_are: str = ""
    timeout: float = 600.0


@dataclass(frozen=True, slots=True)
class BuiltArtifact:
    """A file (or package folder) a runtime loads.

    path: absolute; size_bytes: of the file or of all files in the folder.
    details: facts about the build for the report (integer_linears, float_linears, opset, ...).
    """

    target: str
    precision: Precision
    image_size: Size
    path: Path
    size_bytes: int
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Runnable:
    """What a runtime worker opens: a runner's name in the RUNNERS table, a file and its options.

    threads: intra-op threads, 0 for the runtime's own choice. options: passed to the runner.
    """

    runner: str
    path: Path
    threads: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class EvalSet:
    """Preprocessed images on disk that every runtime reads, so that all see identical tensors.

    pixels: path of a .npy with uint8 [N, H, W, 3]. names: one a image, for flipped-image lists.
    skipped: images left out because they could not be read, each as `name: reason`.
    digest: what decides the pixels (images, labels and contract); empty for a set that nothing keeps.
    parts: a set evaluated in pieces, which then may lie elsewhere; `pixels` is that of the first.
    """

    pixels: Path
    preprocessing: Preprocessing
    count: int
    labels: Labels | None = None
    names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    digest: str = ""
    parts: tuple[EvalSet, ...] = ()


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds for one call at the stated batch, over all rounds. unstable: p90/p50 above 1.5."""

    p50: float
    p90: float
    p99: float
    mean: float
    min: float
    runs: int
    unstable: bool


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An artifact against the FP32 baseline on the same images.

    top1, top5: fractions in 0..1, None without labels. top1_drop: percentage points, positive is
    worse; top1_drop_ci95 from a paired bootstrap. agreement: share of images with the same argmax
    (k-NN agreement for embeddings). sqnr_db: over all outputs, None when identical (infinite).
    kl: mean KL(softmax(baseline) || softmax(artifact)) in nats, None for embeddings.
    """

    images: int
    agreement: float
    sqnr_db: float | None
    cosine: float
    top1: float | None = None
    top5: float | None = None
    top1_drop: float | None = None
    top1_drop_ci95: tuple[float, float] | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """Where one attention layer looks in one image, in float and in int8.

    name: module path. heads, queries, keys: of its weights. grid: (rows, columns) of the patches in a map.
    float_maps, int8_maps: [heads, rows, columns], the weights that `query` gives to each patch (what is
    missing to 1 goes to prefix tokens); None where `reason` says why, or without an int8 program.
    kl: mean KL(float || int8) over all heads and queries, nats.
    """

    name: str
    heads: int
    queries: int
    keys: int
    query: Literal["class token", "mean of all tokens"] = "class token"
    grid: Size | None = None
    float_maps: npt.NDArray[np.float32] | None = None
    int8_maps: npt.NDArray[np.float32] | None = None
    kl: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ImageAttention:
    """All attention layers of one image, in order, and their rollout [rows, columns], None with a reason.

    float_output, int8_output: [K], what the model answered.
    """

    layers: tuple[LayerAttention, ...]
    float_output: npt.NDArray[np.float32]
    int8_output: npt.NDArray[np.float32] | None = None
    float_rollout: npt.NDArray[np.float32] | None = None
    int8_rollout: npt.NDArray[np.float32] | None = None
    rollout_reason: str = ""


@dataclass(frozen=True, slots=True)
class LayerHistogram:
    """What reached one layer's input: counts of `counts` equal bins from `first`, each `width` wide.

    low, high: the range chosen for quantisation. Values are counted as they were, outliers included.
    """

    name: str
    low: float
    high: float
    first: float
    width: float
    counts: tuple[int, ...]

    @property
    def clipped(self) -> float:
        """The share of values in bins that lie wholly outside the chosen range."""
        edges = [self.first + i * self.width for i in range(len(self.counts) + 1)]
        out = sum(n for i, n in enumerate(self.counts) if edges[i + 1] <= self.low or edges[i] >= self.high)
        return out / max(1, sum(self.counts))


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """calibration.json: a histogram of each layer's input on the first `images` calibration images."""

    method: str
    image_size: Size
    images: int
    layers: tuple[LayerHistogram, ...]
    schema: str = "vit-export.calibration/1"
