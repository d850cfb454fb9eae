"""What a runtime can measure beyond a latency and an accuracy, once its artifact was timed: a table.

Each entry is a function of (runnable, images, folder for outputs, accuracy of outputs, timeout in seconds)
that gives facts for `Result.details` and sentences for `Result.notes`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vit_export.artifacts import Accuracy, EvalSet, Logits, Runnable
from vit_export.runtime.report_schema import Result

PROFILES: Mapping[str, str] = {"coreml": "vit_export.runtime.coreml_units:profile"}

Profile = Callable[
    [Runnable, EvalSet, Path, Callable[[Logits], Accuracy], float], tuple[Mapping[str, Any], tuple[str, ...]]
]


def profiled(
    result: Result,
    runnable: Runnable,
    images: EvalSet,
    work: Path,
    accuracy: Callable[[Logits], Accuracy],
    *,
    timeout: float,
) -> Result:
    """`result` with what its runtime adds; the same result where it adds nothing. work: a scratch folder."""
    if runnable.runner not in PROFILES:
        return result
    module, _, name = PROFILES[runnable.runner].partition(":")
    profile: Profile = getattr(importlib.import_module(module), name)
    details, notes = profile(runnable, images, work, accuracy, timeout)
    return msgspec.structs.replace(
        result, details={**result.details, **details}, notes=(*result.notes, *notes)
    )
