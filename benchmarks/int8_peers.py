"""Our int8 against the peers': same weights, same calibration images, same evaluation images, one run.

    python benchmarks/photos.py PHOTOS
    python benchmarks/dinov2_probe.py dinov2_small.safetensors PHOTOS probe.safetensors
    python benchmarks/int8_peers.py examples/dinov2.py:classifier probe.safetensors PHOTOS \
        [--size 224] [--only NAME ...] [--nncf-python PYTHON] [--modelopt-python PYTHON] [--no-time]
        [--keep FOLDER]

Each method quantises in a process of its own (seconds and peak memory are its own, from the loaded float
model to the saved artifact, images included), then every artifact runs on all evaluation images and is
timed in alternating rounds (runtime/latency.py). NNCF and ModelOpt want other versions of onnx and its
kin than vit-export does, so each has an environment of its own; without one its row says so:

    python -m venv nncf && nncf/bin/pip install nncf==3.4.0 openvino==2026.4.1 onnx onnxruntime msgspec pillow
    python -m venv modelopt && modelopt/bin/pip install 'nvidia-modelopt[onnx]==0.47.0' msgspec pillow
    nncf/bin/pip install --no-deps -e . && modelopt/bin/pip install --no-deps -e .
    python benchmarks/int8_peers.py ... --nncf-python nncf/bin/python --modelopt-python modelopt/bin/python

Symmetric rows have no runtime here: they are the quantised program in PyTorch. `ours weights` rows quantise
weights alone (--weights), with GPTQ where it is better.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_export.artifacts import EvalSet, Images, Logits, Preprocessing, Runnable, WeightsOnly

HERE = Path(__file__)
PEER_OPSET = 20


@dataclass(frozen=True)
class Work:
    """What every method is given: float.onnx, float.xml, calib.npy (uint8) and the model's own place."""

    folder: Path
    model: str
    checkpoint: Path
    size: int

    @property
    def embeddings(self) -> bool:
        return self.model.endswith("backbone")

    def images(self, name: str = "calib") -> EvalSet:
        contract = Preprocessing((self.size, self.size))
        path = self.folder / f"{name}.npy"
        return EvalSet(path, contract, len(np.load(path, mmap_mode="r")))

    def singles(self) -> Iterator[Images]:
        from vit_export.calibration.preprocess import batches

        yield from batches(self.images(), 1)

    def program(self) -> Any:
        from vit_export.models import adapt, load
        from vit_export.models.config import AdaptConfig, LoadOptions
        from vit_export.pipeline import trace

        model = load(self.model, LoadOptions(checkpoint=self.checkpoint))
        return trace(adapt(model, (self.size, self.size), AdaptConfig()))


def _ours(target: str, choices: str, weights: WeightsOnly | None = None) -> Callable[[Work, Path], float]:
    def make(work: Work, out: Path) -> float:
        from vit_export.artifacts import BuildRequest, Precision
        from vit_export.calibration.preprocess import Batches
        from vit_export.cli_options import choices as chosen
        from vit_export.export.quantize import quantize
        from vit_export.export.targets import target_named
        from vit_export.search.search import Search

        program, builder = work.program(), target_named(target)
        options = {"weights": weights}
        profile = builder.profile(Precision.INT8, options)
        start = time.perf_counter()
        wanted = chosen({"calib_method": choices, **options})
        found = Search(
            program, Batches(work.images(), 8), wanted, profile, embeddings=work.embeddings, weights=weights
        ).run()
        quantized = quantize(found.program, found.plan, profile)
        seconds = time.perf_counter() - start
        for decision in found.plan.decisions:
            print(f"  {out.name} {decision}", file=sys.stderr)
        if target == "tensorrt":
            from vit_export.export.fake_quant import fake_quantized
            from vit_export.search.judge import run

            np.save(
                out / "eval.npy", run(quantized, fake_quantized(quantized), Batches(work.images("eval"), 8))
            )
        else:
            contract = Preprocessing(program.image_size)
            builder.build(quantized, BuildRequest(Precision.INT8, out, contract, options=options))
        return seconds

    return make


def _ort(work: Work, out: Path, **options: Any) -> float:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = work.singles()

        def get_next(self) -> dict[str, Images] | None:
            images = next(self.rest, None)
            return None if images is None else {"images": images}

    start = time.perf_counter()
    prepared = work.folder / f"{out.name}.prepared.onnx"
    quant_pre_process(str(work.folder / "float.onnx"), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(out / "model.onnx"), Reader(), **options)
    return time.perf_counter() - start


def _ort_matmuls(work: Work, out: Path) -> float:
    import onnx

    graph = onnx.load(str(work.folder / "float.onnx")).graph
    constants = {i.name for i in graph.initializer}
    constants |= {
        o for n in graph.node if n.op_type == "Transpose" and n.input[0] in constants for o in n.output
    }
    others = [n.name for n in graph.node if n.op_type == "MatMul" and not set(n.input) & constants]
    return _ort(work, out, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"], nodes_to_exclude=others)


def _nncf(work: Work, model: Any) -> tuple[Any, float]:
    import nncf

    data = nncf.Dataset(_Singles(work), lambda images: {"images": images})
    start = time.perf_counter()
    quantized = nncf.quantize(
        model, data, model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED,
        subset_size=work.images().count, fast_bias_correction=True,
    )  # fmt: skip
    return quantized, time.perf_counter() - start


class _Singles:
    """An iterable that can be read again."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __iter__(self) -> Iterator[Images]:
        return self.work.singles()


def _nncf_openvino(work: Work, out: Path) -> float:
    import openvino

    model = openvino.Core().read_model(str(work.folder / "float.onnx"))
    quantized, seconds = _nncf(work, model)
    openvino.save_model(quantized, str(out / "model.xml"), compress_to_fp16=False)
    return seconds


def _nncf_onnx(work: Work, out: Path) -> float:
    import onnx

    quantized, seconds = _nncf(work, onnx.load(str(work.folder / "float.onnx")))
    onnx.save(quantized, str(out / "model.onnx"))
    return seconds


def _modelopt(work: Work, out: Path) -> float:
    from modelopt.onnx.quantization import quantize

    pixels = np.concatenate(list(work.singles()))
    start = time.perf_counter()
    quantize(
        str(work.folder / "float.onnx"), quantize_mode="int8", calibration_data={"images": pixels},
        calibration_method="max", output_path=str(out / "model.onnx"), calibration_eps=["cpu"],
    )  # fmt: skip
    return time.perf_counter() - start


METHODS: Mapping[str, tuple[str, Callable[[Work, Path], float]]] = {
    "ours auto, ONNX Runtime": ("onnx", _ours("onnx", "auto")),
    "ours auto, OpenVINO": ("openvino", _ours("openvino", "auto")),
    "ours auto, symmetric": ("numpy", _ours("tensorrt", "auto")),
    "ours plain, ONNX Runtime": ("onnx", _ours("onnx", "minmax")),
    "ours plain, OpenVINO": ("openvino", _ours("openvino", "minmax")),
    "ours plain, symmetric": ("numpy", _ours("tensorrt", "minmax")),
    "ours weights int8, ONNX Runtime": ("onnx", _ours("onnx", "auto", "int8")),
    "ours weights int8, OpenVINO": ("openvino", _ours("openvino", "auto", "int8")),
    "ours weights int4, ONNX Runtime": ("onnx", _ours("onnx", "auto", "int4")),
    "ours weights int4, OpenVINO": ("openvino", _ours("openvino", "auto", "int4")),
    "ORT static, defaults": ("onnx", _ort),
    "ORT static, per-channel weight MatMuls": ("onnx", _ort_matmuls),
    "NNCF, OpenVINO": ("openvino", _nncf_openvino),
    "NNCF, ONNX in ORT": ("onnx", _nncf_onnx),
    "ModelOpt, ONNX in ORT": ("onnx", _modelopt),
}


def make(work: Work, name: str) -> None:
    """In a child: quantise by one method; made.json has its seconds and peak memory."""
    out = work.folder / name
    out.mkdir(exist_ok=True)
    seconds = METHODS[name][1](work, out)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's across fork and exec
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    (out / "made.json").write_text(json.dumps({"seconds": round(seconds, 1), "peak_mib": round(peak)}))


def prepare(work: Work, photos: Path) -> EvalSet:
    """Preprocessed images (those to judge on are returned), the float ONNX file and the float baseline."""
    from vit_export.artifacts import TargetProfile
    from vit_export.calibration.images import open_images
    from vit_export.calibration.preprocess import write_pixels
    from vit_export.export.onnx_graph import save, to_onnx
    from vit_export.export.program import save_baseline

    contract = Preprocessing((work.size, work.size))
    write_pixels(open_images(photos / "calib"), contract, work.folder / "calib.npy")
    judged = write_pixels(open_images(photos / "eval"), contract, work.folder / "eval.npy")
    if not (work.folder / "float.pt2").exists():
        program = work.program()
        profile = TargetProfile("asymmetric", PEER_OPSET, "decomposed")
        save(to_onnx(program, profile), work.folder / "float.onnx")
        save_baseline(program, work.folder / "float.pt2")
    return judged


def run(arguments: argparse.Namespace) -> None:
    """Everything; prints a Markdown table. speed: against ONNX Runtime FP32, in alternating rounds."""
    from vit_export.runtime.latency import alternate

    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        work = Work(folder, arguments.model, arguments.checkpoint, arguments.size)
        judged = prepare(work, arguments.photos)
        baseline = {"PyTorch FP32": Runnable("pytorch", folder / "float.pt2", arguments.threads)}
        baseline["ONNX Runtime FP32"] = Runnable("onnx", folder / "float.onnx", arguments.threads)
        reference = _answers(baseline["PyTorch FP32"], judged, folder / "reference.npy")
        wanted = [name for name in METHODS if not arguments.only or name in arguments.only]
        facts = {name: _judged(arguments, work, name, judged, reference) for name in wanted}
        made = {n: _runnable(work, n, arguments.threads) for n in wanted if "failed" not in facts[n]}
        opened = baseline | {name: runnable for name, runnable in made.items() if runnable is not None}
        timings = None if arguments.no_time else alternate(opened, data=judged)
        print(f"{judged.count} evaluation and {work.images().count} calibration images\n")
        print("| artifact | SQNR dB | agreement | KL | top-1 | MB | speed | seconds | peak MiB |")
        print("|---|---|---|---|---|---|---|---|---|")
        for name in (*baseline, *facts):
            row = dict(facts.get(name, {}))
            if timings is not None and name in timings.rounds:
                row["speed"] = timings.median_ratio("ONNX Runtime FP32", name)
            print(f"| {name} | {row['failed'] if 'failed' in row else _cells(row)} |")


def _judged(
    arguments: argparse.Namespace, work: Work, name: str, judged: EvalSet, reference: Logits
) -> dict[str, Any]:
    """What one method costs and gives; found again with --keep."""
    from vit_export.runtime.accuracy import compare

    known = work.folder / name / "facts.json"
    if known.exists():
        found: dict[str, Any] = json.loads(known.read_text())
        return found
    facts = _child(arguments, work, name)
    if "failed" in facts:
        return facts
    runnable = _runnable(work, name, arguments.threads)
    answers = known.with_name("eval.npy")
    logits = np.load(answers) if runnable is None else _answers(runnable, judged, answers)
    seen = compare(reference, logits, judged.labels, embeddings=work.embeddings)
    size = sum(file.stat().st_size for file in known.parent.glob("model.*")) / 1e6
    facts |= {"sqnr": seen.sqnr_db, "agreement": seen.agreement, "kl": seen.kl, "top1": seen.top1}
    facts |= {"mb": size or None}
    known.write_text(json.dumps(facts))
    print(f"  {name}: {facts}", file=sys.stderr, flush=True)
    return facts


def _answers(runnable: Runnable, images: EvalSet, path: Path) -> Logits:
    from vit_export.runtime.inference import predict

    if path.exists():
        known: Logits = np.load(path)
        return known
    return predict(runnable, images, path, batch=8).logits


def _runnable(work: Work, name: str, threads: int) -> Runnable | None:
    """How a method's artifact is opened; None for one without a runtime here."""
    runner = METHODS[name][0]
    if runner == "numpy":
        return None
    suffix = ".xml" if runner == "openvino" else ".onnx"
    return Runnable(runner, work.folder / name / f"model{suffix}", threads)


def _cells(row: Mapping[str, float | None]) -> str:
    measured = (("sqnr", 1), ("agreement", 3), ("kl", 4), ("top1", 3), ("mb", 1))
    costs = (("speed", 2), ("seconds", 1), ("peak_mib", 0))
    return " | ".join(_cell(row.get(key), digits) for key, digits in (*measured, *costs))


def _child(arguments: argparse.Namespace, work: Work, name: str) -> dict[str, Any]:
    tool = name.split(",")[0].lower()
    python = getattr(arguments, f"{tool}_python", sys.executable)
    if python is None:
        return {"failed": f"not run: no --{tool}-python"}
    made = work.folder / name / "made.json"
    if not made.exists():
        given = [work.model, str(work.checkpoint), str(work.folder), "--size", str(work.size), "--make", name]
        done = subprocess.run([python, str(HERE), *given], capture_output=True, text=True)
        sys.stderr.write("".join(line + "\n" for line in done.stderr.splitlines() if line.startswith("  ")))
        if done.returncode:
            return {"failed": "failed: " + done.stderr.strip().splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(made.read_text())
    return found


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--nncf-python")
    parser.add_argument("--modelopt-python")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument(
        "--keep", type=Path, help="folder of artifacts and figures; those there are used again"
    )
    parser.add_argument("--make", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(Work(given.photos, given.model, given.checkpoint, given.size), given.make)
    else:
        run(given)
