"""All evaluation images through one artifact, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vit_export.artifacts import EvalSet, Logits, Runnable
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.worker_client import Worker


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What an artifact said. logits: float32 [N, K], memory-mapped. load_seconds: SDK import included.

    details: how the runtime runs the artifact, see Runner.details.
    """

    logits: Logits
    version: str
    load_seconds: float
    peak_rss_bytes: int | None
    details: Mapping[str, Any] = field(default_factory=dict)


def predict(
    runnable: Runnable,
    data: EvalSet,
    out: Path,
    *,
    batch: int = 16,
    timeout: float = 600.0,
    progress: ProgressCallback | None = None,
) -> Prediction:
    """Run every image of `data` and keep the outputs in `out` (.npy).

    timeout: seconds to open the artifact, and for each batch. progress: (runner, images done, of).
    Raises MissingExtra, InputError or RunnerError (WorkerCrash and WorkerTimeout among them).
    """
    with Worker(runnable, timeout=timeout) as worker:
        logits = worker.infer(data, out, batch=batch, progress=progress)
        details, info = worker.details(data), worker.info()
        return Prediction(logits, info.version, worker.opened.seconds, info.peak_rss_bytes, details)
