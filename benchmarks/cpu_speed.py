"""How fast this machine's runtimes are at one model, beside PyTorch and NNCF, and where the time goes.

    python benchmarks/cpu_speed.py dinov2 --weights dinov2_small.safetensors --photos PHOTOS
    python benchmarks/cpu_speed.py deit_small_patch16_224          # a timm model with seeded weights

Artifacts are built through the same targets as the command line's, calibrated with min-max. Then all are
timed in alternating rounds, a process each (runtime/latency.py). `--profile` adds a table of operators for
ONNX Runtime and OpenVINO; a profiled run is slower than a timed one, its shares are what counts. Work is
kept in --work, so that the building can be done once and the timing repeated alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_export.artifacts import BuildRequest, EvalSet, LoadedModel, Precision, Preprocessing, Runnable
from vit_export.runtime.accuracy import sqnr_db
from vit_export.runtime.latency import alternate
from vit_export.runtime.worker_client import Worker

ROOT = Path(__file__).parents[1]
EVALUATED = 64
_BF16, _F32 = {"inference_precision": "bf16"}, {"inference_precision": "f32"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: what opens it. plan_db: SQNR of the quantised program in PyTorch, for ours."""

    runner: str
    path: str
    options: Mapping[str, Any]
    plan_db: float | None = None


def load_model(name: str, weights: Path | None) -> LoadedModel:
    """DINOv2-S at 224 with real weights, or a timm model with seeded ones."""
    import torch

    from vit_export.models import adapt, load
    from vit_export.models.config import LoadOptions

    if name == "dinov2":
        source = f"{ROOT / 'examples' / 'dinov2.py'}:backbone"
        return adapt(load(source, LoadOptions(checkpoint=weights)), (224, 224))
    torch.manual_seed(0)
    return load(f"timm:{name}", LoadOptions())


def photographs(photos: Path, which: str, contract: Preprocessing, path: Path, count: int) -> EvalSet:
    """Preprocessed photographs of one folder."""
    from vit_export.calibration.images import open_images
    from vit_export.calibration.preprocess import write_pixels

    return write_pixels(open_images(photos / which, limit=count, seed=0), contract, path)


def build(arguments: argparse.Namespace, work: Path) -> dict[str, Entry]:
    """Build every artifact once; rows by name."""
    import torch

    from vit_export.calibration.collect import calibrate
    from vit_export.calibration.observers import MinMaxConfig
    from vit_export.calibration.plan import plan
    from vit_export.calibration.preprocess import batches
    from vit_export.export.program import save_baseline, trace
    from vit_export.export.quantize import quantize
    from vit_export.export.targets import target_named

    model = load_model(arguments.model, arguments.weights)
    contract = model.preprocessing
    calib = photographs(arguments.photos, "calib", contract, work / "calib.npy", 64)
    images = photographs(arguments.photos, "eval", contract, work / "eval.npy", EVALUATED)
    program = trace(model)
    decided = plan(calibrate(program, batches(calib, 8), MinMaxConfig()), program.layers)
    save_baseline(program, work / "baseline.pt2")
    rows = {"PyTorch fp32 eager": Entry("pytorch", str(work / "baseline.pt2"), {})}
    with torch.inference_mode():
        reference = np.concatenate([model.module(torch.from_numpy(b)).numpy() for b in batches(images, 8)])
    np.save(work / "reference.npy", reference)
    names = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
    for target in (target_named(name) for name in names):
        for precision in (Precision.FP32, Precision.INT8):
            graph, plan_db = program, None
            if precision is Precision.INT8:
                graph = quantize(program, decided, target.profile(precision, {}))
                with torch.inference_mode():
                    outputs = [graph.graph(torch.from_numpy(b)).numpy() for b in batches(images, 8)]
                plan_db = sqnr_db(reference, np.concatenate(outputs))
            folder = work / target.name / precision
            artifact = target.build(graph, BuildRequest(precision, folder, contract))
            path, name = str(artifact.path), f"{names[target.name]} {precision}"
            if target.name == "onnx":
                rows[name] = Entry("onnx", path, {}, plan_db)
            else:
                rows[f"{name}, f32 rest"] = Entry("openvino", path, _F32, plan_db)
                rows[f"{name}, bf16 rest"] = Entry("openvino", path, _BF16, plan_db)
    nncf = nncf_openvino(model, calib, work / "nncf.xml")
    rows["NNCF OpenVINO int8, f32 rest"] = Entry("openvino", str(nncf), _F32)
    rows["NNCF OpenVINO int8, bf16 rest"] = Entry("openvino", str(nncf), _BF16)
    facts = {"macs": program.macs, "attention_macs": program.attention_macs, "contract": asdict(contract)}
    saved = {"facts": facts, "rows": {name: asdict(row) for name, row in rows.items()}}
    (work / "rows.json").write_text(json.dumps(saved, indent=1))
    return rows


def nncf_openvino(model: LoadedModel, calib: EvalSet, path: Path) -> Path:
    """NNCF's quantisation of the model as OpenVINO converts it: transformer, mixed preset, same images."""
    import nncf
    import openvino
    import torch

    from vit_export.calibration.preprocess import batches

    dataset = nncf.Dataset(list(batches(calib, 1)))
    shape = (1, 3, *model.image_size)
    quantised = nncf.quantize(
        openvino.convert_model(model.module, example_input=torch.zeros(shape), input=[[-1, *shape[1:]]]),
        dataset,
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=calib.count,
    )
    openvino.save_model(quantised, str(path), compress_to_fp16=False)
    return path


def evaluation(work: Path) -> tuple[EvalSet, dict[str, Any]]:
    """The images that were kept and the facts of the model."""
    saved = json.loads((work / "rows.json").read_text())
    given = dict(saved["facts"]["contract"])
    contract = Preprocessing(tuple(given.pop("size")), tuple(given["mean"]), tuple(given["std"]))
    count = len(np.load(work / "eval.npy", mmap_mode="r"))
    return EvalSet(work / "eval.npy", contract, count), saved["facts"]


def table(rows: Mapping[str, Entry], work: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """Lines of the Markdown table."""
    images, facts = evaluation(work)
    reference = np.load(work / "reference.npy")
    runnables = {n: Runnable(r.runner, Path(r.path), arguments.threads, r.options) for n, r in rows.items()}
    quality = {}
    for name, runnable in runnables.items():
        with Worker(runnable) as worker:
            quality[name] = sqnr_db(reference, worker.infer(images, work / "out.npy", batch=8))
    timings = alternate(runnables, data=images, batch=arguments.batch, rounds=arguments.rounds, runs=15)
    slow, base = "PyTorch fp32 eager", "ONNX Runtime fp32"
    yield f"{facts['macs'] / 1e9:.2f} GMAC, of them {facts['attention_macs'] / 1e9:.2f} in attention"
    yield "| artifact | ms p50 | min | against PyTorch | against ORT fp32 | GMAC/s | SQNR dB | plan dB |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in rows.items():
        latency = timings.latency(name)
        speed = arguments.batch * facts["macs"] / latency.p50 / 1e6
        yield (
            f"| {name} | {latency.p50:.1f} | {latency.min:.1f} | {timings.median_ratio(slow, name):.2f} "
            f"| {timings.median_ratio(base, name):.2f} | {speed:.0f} | {_db(quality[name])} "
            f"| {_db(row.plan_db) if row.plan_db else '-'} |"
        )


def _db(value: float | None) -> str:
    return "inf" if value is None else f"{value:.1f}"


def ort_operators(path: str, images: np.ndarray, threads: int, runs: int = 30) -> Counter[str]:
    """Milliseconds a call by operator, from ONNX Runtime's profiler."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(2 * runs):
        session.run(None, {session.get_inputs()[0].name: images})
    trace = Path(session.end_profiling())
    events = json.loads(trace.read_text())
    trace.unlink()
    start = [event["ts"] for event in events if event["name"] == "model_run"][runs]
    total: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time") and event["ts"] >= start:
            total[event["args"]["op_name"]] += event["dur"] / 1e3 / runs
    return total


def openvino_operators(
    path: str, images: np.ndarray, config: Mapping[str, Any], threads: int
) -> Counter[str]:
    """Milliseconds a call by operator and kernel, from OpenVINO's counters."""
    import openvino

    core, runs = openvino.Core(), 30
    model = core.read_model(path)
    model.reshape(list(images.shape))
    settings = {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True, "INFERENCE_NUM_THREADS": threads}
    settings["INFERENCE_PRECISION_HINT"] = config["inference_precision"]
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    total: Counter[str] = Counter()
    for turn in range(2 * runs):
        request.infer([images])
        if turn >= runs:
            for node in request.profiling_info:
                total[f"{node.node_type} {node.exec_type}"] += node.real_time.total_seconds() * 1e3 / runs
    return total


def profiles(rows: Mapping[str, Entry], work: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """Lines of the operator tables of the int8 artifacts and of ONNX Runtime's fp32."""
    images, _ = evaluation(work)
    pixels = np.load(images.pixels, mmap_mode="r")[: arguments.batch]
    data = images.preprocessing.normalize(np.asarray(pixels))
    for name, row in rows.items():
        if row.runner == "onnx":
            total = ort_operators(row.path, data, arguments.threads)
        elif row.runner == "openvino" and "int8" in name:
            total = openvino_operators(row.path, data, row.options, arguments.threads)
        else:
            continue
        every = sum(total.values())
        yield f"\n{name}: {every:.1f} ms in operators"
        yield from (f"  {ms:7.2f} ms {ms / every:5.0%}  {kind}" for kind, ms in total.most_common(9))


def main() -> None:
    """Build what is missing, then print the table and, if asked, the operators."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--photos", type=Path, required=True, help="as benchmarks/photos.py writes them")
    parser.add_argument("--work", type=Path, default=Path("cpu-speed"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    work = (arguments.work / arguments.model).absolute()
    work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if not (work / "rows.json").exists():
        build(arguments, work)
        print(f"built in {time.perf_counter() - began:.0f} s", flush=True)
    if arguments.build_only:
        return
    rows = {n: Entry(**row) for n, row in json.loads((work / "rows.json").read_text())["rows"].items()}
    for line in table(rows, work, arguments):
        print(line, flush=True)
    if arguments.profile:
        for line in profiles(rows, work, arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()
