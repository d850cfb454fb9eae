"""What a sweep's machinery costs: overhead of a task, and an evaluation of 2,000 images on 1 and 2 workers.

    python benchmarks/sweep_costs.py [--images 2000] [--part 256]

Overhead: 1,000 tasks that do nothing, and 200 that find their result in the store, submitted at once to
two worker processes. Scaling: `part` tasks of digits-vit's FP32 baseline under PyTorch with one thread,
each with a store of its own, on the embedded digits, repeated with noise. Worker processes are started
before the clock is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from vit_export.data import DIGITS_IMAGES
from vit_export.job import ExportJob
from vit_export.runtime.console import make_console, plain_table
from vit_export.sweep import cluster, tasks
from vit_export.sweep.flow import Flow
from vit_export.sweep.matrix import Cell
from vit_export.sweep.run import _call


def nothing(number: int) -> int:
    return number


def images(path: Path, count: int) -> None:
    """`count` digits with a little noise, so that no two are alike."""
    with np.load(DIGITS_IMAGES) as stored:
        pixels, labels = stored["eval_images"], stored["eval_labels"]
    which = np.arange(count) % len(pixels)
    noise = np.random.default_rng(0).integers(0, 4, (count, *pixels.shape[1:]), dtype=np.uint8)
    np.savez(path, images=np.minimum(pixels[which], 251) + noise, labels=labels[which])


def evaluate(client: object, folder: Path, npz: Path, part: int) -> float:
    """Seconds from the first `part` task to the last."""
    job = ExportJob(calib=None, evaluation=npz, threads=1, part=part, bundle_images=None)
    flow = Flow(str(folder))
    one = flow.cell(Cell("g", {}, replace(job)))
    prepared = client.submit(_call, one.prepare.function, one.prepare.arguments).result()  # type: ignore[attr-defined]
    assert not prepared.failed, prepared.failed
    base = [
        node for node in flow.nodes.values() if node.stage == "evaluate" and node.before == (one.prepare,)
    ]
    began = time.perf_counter()
    futures = [client.submit(_call, node.function, node.arguments, prepared) for node in base]  # type: ignore[attr-defined]
    done = [future.result() for future in futures]
    seconds = time.perf_counter() - began
    assert not any(one.failed for one in done), done
    assert sum(one.value["images"] for one in done) == len(np.load(npz)["labels"])
    return seconds


def found(client: object, folder: Path, npz: Path, part: int, count: int) -> float:
    """Milliseconds of a task whose result is in the store."""
    flow = Flow(str(folder))
    one = flow.cell(Cell("g", {}, ExportJob(evaluation=npz, threads=1, part=part, bundle_images=None)))
    began = time.perf_counter()
    futures = [client.submit(_call, tasks.prepare, one.prepare.arguments, pure=False) for _ in range(count)]  # type: ignore[attr-defined]
    done = [future.result() for future in futures]
    assert not any(one.made for one in done)
    return (time.perf_counter() - began) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--part", type=int, default=256)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images(folder / "eval.npz", asked.images)
        seconds = {}
        for workers in (1, 2):
            with cluster.connected(None, cluster.Tls(), workers) as (client, _):
                client.wait_for_workers(workers)
                client.gather(client.map(nothing, range(10)))
                store = folder / str(workers)
                seconds[workers] = evaluate(client, store, folder / "eval.npz", asked.part)
                rows.append((f"{asked.images} images, {workers} workers", f"{seconds[workers]:.1f} s"))
                if workers == 1:
                    parts = -(-asked.images // asked.part)
                    rows.append((f"one part of {asked.part}", f"{seconds[1] / parts:.2f} s"))
                if workers == 2:
                    began = time.perf_counter()
                    client.gather(client.map(nothing, range(1000)))
                    rows.append(("empty task", f"{time.perf_counter() - began:.2f} ms"))
                    cost = found(client, store, folder / "eval.npz", asked.part, 200)
                    rows.append(("task found in the store", f"{cost:.1f} ms"))
        rows.append(("2 workers against 1", f"{seconds[1] / seconds[2]:.2f}x"))
    make_console().print(plain_table(("what", "measured"), rows))


if __name__ == "__main__":
    main()
