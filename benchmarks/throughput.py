"""Latency and images a second of built artifacts over batches 1 to 32 and 1 to N threads.

    python benchmarks/cpu_speed.py dinov2 --weights W --photos PHOTOS --build-only
    python benchmarks/throughput.py cpu-speed/dinov2/*/int8/model.onnx cpu-speed/dinov2/*/int8/model.xml

The same measurement as `vit-export --throughput` (runtime/throughput.py), on seeded noise, as a Markdown
table: milliseconds a call and images a second for calls one by one, images a second for calls at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from vit_export.artifacts import Runnable
from vit_export.runtime.report_schema import ThroughputPoint
from vit_export.runtime.throughput import BATCHES, curve

RUNNERS = {".onnx": "onnx", ".xml": "openvino"}


def rows(name: str, points: list[ThroughputPoint]) -> Iterator[str]:
    """A line of the table for each way of calling."""
    for mode, threads, streams in dict.fromkeys((p.mode, p.threads, p.streams) for p in points):
        speeds = {p.batch: p.images_per_s for p in points if (p.mode, p.threads) == (mode, threads)}
        calls = "one by one" if mode == "latency" else f"{streams} at once"
        cells = [
            f"{1e3 * batch / speed:.1f} ms, {speed:.1f}/s" if mode == "latency" else f"{speed:.1f}/s"
            for batch, speed in sorted(speeds.items())
        ]
        yield f"| {name} | {calls} | {threads} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table of every file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="+", type=Path, help=".onnx (ONNX Runtime) or .xml (OpenVINO)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=1.0, help="of each point")
    parser.add_argument("--precision", default="f32", help="of OpenVINO's float rest: f32 or bf16")
    arguments = parser.parse_args()
    print(f"| file | calls | threads | {' | '.join(f'batch {batch}' for batch in BATCHES)} |")
    print(f"|---|---|---|{'---|' * len(BATCHES)}")
    for file in arguments.file:
        runner = RUNNERS[file.suffix]
        options = {"inference_precision": arguments.precision} if runner == "openvino" else {}
        runnable = Runnable(runner, file, arguments.threads, options)
        name = "/".join(file.parts[-3:])
        for line in rows(name, list(curve(runnable, None, seconds=arguments.seconds))):
            print(line, flush=True)


if __name__ == "__main__":
    main()
