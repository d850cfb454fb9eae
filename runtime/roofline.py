"""How far each artifact is from what the processor can do: its products a second beside measured ceilings.

A share of the int8 ceiling counts every product of the model as if it were int8; what stays float (the
patch embedding, attention) and everything that is no product at all is what keeps it below one.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from vit_export.artifacts import Latency, Precision, Size
from vit_export.python310 import module_command
from vit_export.runtime.environment import physical_cores
from vit_export.runtime.report_schema import Baseline, Ceilings, Report, Result, Roofline
from vit_export.runtime.worker_client import pool_environment

Arithmetic = Literal["fp32", "bf16", "int8"]

CPU_TARGETS = ("onnx", "openvino")
_SECONDS = 120.0  # until a probe that hangs is given up


def measure_ceilings(threads: int) -> Ceilings | None:
    """What this machine reaches with so many threads (0: all cores); None where no runtime can tell."""
    threads = threads or physical_cores()
    try:
        done = subprocess.run(
            module_command("vit_export.runtime.ceilings", str(threads)),
            capture_output=True,
            timeout=_SECONDS,
            check=True,
            env=pool_environment(os.environ, threads),
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    return msgspec.convert({**found, "threads": threads}, Ceilings) if found else None


def with_roofline(
    report: Report,
    macs: Mapping[Size, int],
    batch: int = 1,
    ceilings_for: Callable[[int], Ceilings | None] | None = None,
) -> Report:
    """The report with ceilings and what its baselines and CPU artifacts reach of them; as it is if no time
    was taken on this processor.

    macs: multiply-accumulates of one image, by image size; a size that is not there is left out.
    ceilings_for: of so many threads, where another machine took the times; measured here without.
    """
    timed = [r for r in report.results if r.target in CPU_TARGETS and r.latency_ms]
    if not timed or not macs:
        return report
    ceilings = (ceilings_for or measure_ceilings)(report.environment.threads)

    def reached(size: Size, latency: Latency | None, arithmetic: Arithmetic) -> Roofline | None:
        if latency is None or size not in macs:
            return None
        speed = batch * macs[size] / latency.p50 / 1e6
        top: float | None = getattr(ceilings, arithmetic, None)
        return Roofline(gmac_per_s=speed, ceiling=arithmetic, share=speed / top if top else None)

    def of_result(result: Result) -> Result:
        if result not in timed:
            return result
        found = reached(result.image_size, result.latency_ms, _arithmetic(result))
        return msgspec.structs.replace(result, roofline=found)

    def of_baseline(baseline: Baseline) -> Baseline:
        found = reached(baseline.image_size, baseline.latency_ms, "fp32")
        return msgspec.structs.replace(baseline, roofline=found)

    return msgspec.structs.replace(
        report,
        ceilings=ceilings,
        baseline=of_baseline(report.baseline),
        more_baselines=tuple(map(of_baseline, report.more_baselines)),
        results=tuple(map(of_result, report.results)),
    )


def _arithmetic(result: Result) -> Arithmetic:
    """What most products of an artifact are computed in; fp16 files are computed in float32 on CPUs."""
    if result.precision is Precision.INT8:
        return "int8"
    return "bf16" if result.details.get("inference_precision") == "bf16" else "fp32"
