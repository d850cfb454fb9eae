"""From what a user types to what an ExportJob holds. Imports no stage before it is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_export.errors import UsageError

if TYPE_CHECKING:
    from vit_export.artifacts import Precision, Size
    from vit_export.calibration.observers import ObserverConfig
    from vit_export.job import ExportJob
    from vit_export.models.config import AdaptConfig, LoadOptions
    from vit_export.search.choices import Choices

TARGETS = ("onnx", "openvino", "tensorrt", "coreml")
TUNE_MINUTES = 5.0
METHODS = ("auto", "minmax", "percentile", "mse", "entropy")

# Options that only one target understands, under the names it reads them by.
TARGET_OPTIONS = (
    "weights", "coreml_target", "coreml_input", "coreml_activations", "palettize", "labels", "author",
    "license",
    "int8_attention", "trt_flavor", "trt_workspace_mib", "trt_optimization_level", "trt_compatibility",
    "trt_dla_core", "trt_version_compatible", "onnx_operators",
    "openvino_precision", "openvino_products",
)  # fmt: skip


def export_job(options: Mapping[str, Any]) -> ExportJob:
    """The job that the parsed command line asks for. Raises UsageError for values that cannot be."""
    from vit_export.job import ExportJob

    fixed, profile = batch(options["batch_size"])
    extra = {name: options[name] for name in TARGET_OPTIONS if options[name] is not None}
    if profile is not None:
        extra["trt_batches"] = profile
    if options["trt_compute_capabilities"]:
        extra["trt_compute_capabilities"] = capabilities(options["trt_compute_capabilities"])
    return ExportJob(
        model=options["model"],
        load=load_options(options),
        adapt=adapt_config(options),
        image_sizes=tuple(size(text) for text in options["image_size"] or ()),
        targets=targets(options["target"]),
        precisions=precisions(options),
        calib=place(options["calib"]),
        calib_size=options["calib_size"],
        choices=choices(options),
        evaluation=place(options["evaluation"]),
        eval_size=options["eval_size"],
        keep_float=tuple(options["keep_float"] or ()),
        max_drop=options["max_drop"],
        sensitivity=options["sensitivity"],
        batch_size=fixed,
        threads=options["threads"],
        opset=options["opset"],
        output=options["output"].absolute(),
        seed=options["seed"],
        timeout=options["timeout"],
        require_run=options["require_run"],
        bundle_images=options["bundle_images"] if options["bundle"] else None,
        zipped=options["zipped"],
        attention=options["attention"],
        tune=_tuning(options["tune"], options["tune_budget"]),
        throughput=options["throughput"],
        options=extra,
        resume=options["resume"],
        store=options["store"],
    )


def _tuning(wanted: bool, minutes: float | None) -> float | None:
    """Seconds that --tune may take; None without it."""
    if not wanted:
        if minutes is not None:
            raise UsageError("--tune-budget without --tune", "add --tune")
        return None
    return 60.0 * (TUNE_MINUTES if minutes is None else minutes)


def attention_job(options: Mapping[str, Any]) -> ExportJob:
    """The job behind `vit-export attention`: how to load, calibrate and quantise, nothing to build."""
    from vit_export.job import ExportJob
    from vit_export.models.config import LoadOptions

    return ExportJob(
        model=options["model"],
        load=LoadOptions(**{name: options[name] for name in ("checkpoint", "pretrained", "num_classes")}),
        image_sizes=(size(options["image_size"]),) if options["image_size"] else (),
        targets=targets([options["target"]])[:1],
        calib=options["calib"],
        calib_size=options["calib_size"],
        choices=choices(options),
        keep_float=tuple(options["keep_float"] or ()),
        output=options["output"].absolute(),
        seed=options["seed"],
    )


def place(text: str | None) -> Path | str | None:
    """Where images are: a path, or a URL as text."""
    return text if text is None or "://" in text else Path(text)


def load_options(options: Mapping[str, Any]) -> LoadOptions:
    """How to load the model."""
    from vit_export.artifacts import Interpolation
    from vit_export.models.config import LoadOptions

    names = (
        "checkpoint",
        "pretrained",
        "num_classes",
        "crop_pct",
        "trust_remote_code",
        "pos_embed",
        "prefix_tokens",
    )
    return LoadOptions(
        **{name: options[name] for name in names},
        mean=triple("--mean", options["mean"]),
        std=triple("--std", options["std"]),
        interpolation=choice("--interpolation", options["interpolation"], Interpolation),
    )


def adapt_config(options: Mapping[str, Any]) -> AdaptConfig:
    """How positions are carried to another image size."""
    from vit_export.models.config import AdaptConfig, PosEmbedMode

    mode = choice("--pos-embed-mode", options["pos_embed_mode"], PosEmbedMode)
    return AdaptConfig(mode, options["antialias"], options["pos_embed"], options["prefix_tokens"])


def size(text: str) -> Size:
    """`224` or `192x320` as (height, width)."""
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UsageError(f"--image-size {text} is no size", "N or HxW, as 224 or 192x320")
    return int(sides[0]), int(sides[-1])


def batch(text: str | None) -> tuple[int | None, tuple[int, int, int] | None]:
    """(fixed batch, profile) of `8`, or of `1,8,32`: min, opt and max of a dynamic batch for TensorRT."""
    if text is None:
        return None, None
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch-size {text} is no batch", "N, or MIN,OPT,MAX for a TensorRT profile")
    numbers = [int(part) for part in parts]
    if len(numbers) == 1:
        return numbers[0], None
    return None, (numbers[0], numbers[1], numbers[2])


def capabilities(text: str) -> tuple[str, ...]:
    """`8.6,8.9` as compute capabilities."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"\d+\.\d", part) for part in found):
        raise UsageError(
            f"--trt-compute-capabilities {text} names no GPUs", "as NVIDIA numbers them: 8.6,8.9,12.0"
        )
    return found


def targets(names: list[str] | None) -> tuple[str, ...]:
    """The targets asked for, each once; onnx without any."""
    asked = names or ["onnx"]
    for name in asked:
        if name not in (*TARGETS, "all"):
            raise UsageError(f"unknown target {name!r}", f"one of {', '.join(TARGETS)}, all")
    return TARGETS if "all" in asked else tuple(dict.fromkeys(asked))


def precisions(options: Mapping[str, Any]) -> tuple[Precision, ...]:
    """The precisions asked for; fp32 without any. --weights asks for int8."""
    from vit_export.artifacts import Precision

    asked = {"int8": bool(options["weights"])}
    return tuple(p for p in Precision if options[p.value] or asked.get(p)) or (Precision.FP32,)


def choices(options: Mapping[str, Any]) -> Choices:
    """What calibration may choose between: everything with `auto`, else only what a flag opens.

    What moves outliers from activations into weights is not tried where these alone are quantised.
    """
    from vit_export.search.choices import ALPHAS, Choices

    method, auto = options["calib_method"], options["calib_method"] == "auto"
    given, budget = options.get, options.get("search_budget")
    both = auto and not given("weights")
    return Choices(
        observer=observer("minmax" if auto else method),
        rotate=_open("--rotate", given("rotate"), auto, (False, True), (False,)),
        alphas=_open("--equalize", given("equalize"), both, ALPHAS, (None,)),
        divide=_open("--divide-outliers", given("divide_outliers"), both, (False, True), (False,)),
        rounding=_open("--rounding", given("rounding"), auto, ("nearest", "gptq"), ("nearest",)),
        correct_bias=_open("--bias-correction", given("bias_correction"), auto, (False, True), (False,)),
        budget=None if budget is None else 60.0 * budget,
    )


_WORDS: Mapping[str, Mapping[str, Any]] = {
    "--rotate": {"on": True, "off": False},
    "--equalize": {"off": None},
    "--divide-outliers": {"on": True, "off": False},
    "--rounding": {"nearest": "nearest", "gptq": "gptq"},
    "--bias-correction": {"on": True, "off": False},
}


def _open(flag: str, text: str | None, auto: bool, every: tuple[Any, ...], plain: tuple[Any, ...]) -> Any:
    """The options that a flag leaves open: all of them for `auto`, one for a word (or number) of its own."""
    if text is None:
        return every if auto else plain
    if text == "auto":
        return every
    words = _WORDS[flag]
    if text in words:
        return (words[text],)
    if flag == "--equalize" and (alpha := _number(text)) is not None:
        return (alpha,)
    number = " or a number in 0..1" if flag == "--equalize" else ""
    raise UsageError(f"unknown {flag} {text!r}", f"auto, {', '.join(words)}{number}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def observer(method: str) -> ObserverConfig:
    """The config of a calibration method."""
    from vit_export.calibration.observers import METHODS as known

    if method not in known:
        raise UsageError(f"unknown --calib-method {method!r}", f"one of {', '.join(METHODS)}")
    return known[method]


def choice(flag: str, name: str | None, names: Any) -> Any:
    """The member of a StrEnum that a flag names; None for None."""
    if name is not None and name not in tuple(names):
        raise UsageError(f"unknown {flag} {name!r}", f"one of {', '.join(names)}")
    return None if name is None else names(name)


def triple(flag: str, text: str | None) -> tuple[float, float, float] | None:
    """`0.5,0.5,0.5` as three numbers."""
    if text is None:
        return None
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{flag} {text} is not three numbers", f"{flag} 0.5,0.5,0.5") from error
    return red, green, blue
