"""Judging a bundle's artifacts on the machine at hand: the base install and one runtime, no PyTorch.

Each artifact is opened in a process of its own, must reproduce the golden images within what it lost where
it was exported, then runs the evaluation images; latencies are taken last, in alternating rounds. The
baseline is the FP32 PyTorch outputs that the bundle carries, so its accuracy is known and its speed is not.

    with workspace(output) as work:
        report = verify(open_bundle(path, work), VerifyJob(), output, work)
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from vit_export.errors import InputError, UsageError
from vit_export.runtime import beside, report_files, thumbnails, verdict
from vit_export.runtime.bundle_open import Bundle
from vit_export.runtime.costs import Costs
from vit_export.runtime.device import read_device, throttling
from vit_export.runtime.environment import collect as environment
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import Data, Device, DeviceState, EvalData, PackedIds, Report, Result
from vit_export.runtime.roofline import with_roofline
from vit_export.runtime.verify_size import OneSize, VerifyJob

__all__ = ["VerifyJob", "check_targets", "exit_code", "verify", "workspace"]


@contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """A scratch folder in `output`, gone afterwards. Raises UsageError if the place cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".work-", dir=output, ignore_cleanup_errors=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {output}: {error.strerror}", "choose a writable --output with free space"
        ) from error
    try:
        with folder as work:
            yield Path(work)
    finally:
        if output.is_dir() and not any(output.iterdir()):  # a bundle that was refused leaves nothing
            output.rmdir()


def verify(
    bundle: Bundle,
    job: VerifyJob,
    output: Path,
    work: Path,
    command: str = "",
    progress: ProgressCallback | None = None,
) -> Report:
    """Judge the bundle's artifacts here, write the report into `output` and return it.

    work: an empty scratch folder. An artifact that fails or cannot run here is a row with its reason.
    Raises UsageError for a target that the bundle does not have, InputError for damaged contents.
    """
    check_targets(bundle, job)
    with Costs(progress or _silent) as costs:
        return _verify(bundle, job, output, work, command, costs)


def _verify(bundle: Bundle, job: VerifyJob, output: Path, work: Path, command: str, costs: Costs) -> Report:
    notify = costs.notify
    beside.clear(output)
    before = read_device()
    sizes = [
        OneSize(bundle, stored, job, output, work, notify)
        for stored in bundle.manifest.sizes
        if any(a.image_size == stored.image_size for a in job.chosen(bundle.manifest))
    ]
    results = [size.run() for size in sizes]
    report = _report(bundle, job, sizes, results, before, command)
    images = [bundle.images(size.stored.evaluation, size.stored.preprocessing) for size in sizes]
    thumbnails.write(report, images, output)
    notify("measure the processor", 0, 1)
    model = bundle.manifest.model
    macs = {model.preprocessing.size: model.macs} if model.macs else {}
    report = with_roofline(report, macs, bundle.manifest.batch_size or 1)
    report = msgspec.structs.replace(report, costs=costs.so_far())
    report_files.write(report, output)
    return report


def check_targets(bundle: Bundle, job: VerifyJob) -> None:
    """Raise UsageError unless every asked target is in the bundle, InputError if it holds no artifact."""
    have = tuple(dict.fromkeys(artifact.target for artifact in bundle.manifest.artifacts))
    for target in job.targets:
        if target not in have:
            raise UsageError(f"the bundle has no artifact for {target}", f"it has {', '.join(have)}")
    if not have:
        raise InputError("the bundle holds no artifact", "every target failed when it was exported")


def exit_code(report: Report, job: VerifyJob) -> int:
    """As after an export; but 3 as well where nothing could run: then nothing was verified."""
    nothing = all(result.status == "not_run" for result in report.results)
    return verdict.exit_code(report, max_drop=job.max_drop, require_run=job.require_run or nothing)


def _report(
    bundle: Bundle,
    job: VerifyJob,
    sizes: Sequence[OneSize],
    results: Sequence[tuple[Result, ...]],
    before: DeviceState,
    command: str,
) -> Report:
    manifest = bundle.manifest
    after = read_device()
    baselines = [size.baseline() for size in sizes]
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return Report(
        created=datetime.now(timezone.utc),
        command=command,
        environment=environment(job.threads),
        model=msgspec.structs.replace(
            manifest.model, notes=(*manifest.model.notes, f"verified from a bundle made with {made}")
        ),
        data=Data(eval=_eval_data(bundle, sizes[0])),
        baseline=baselines[0],
        more_baselines=tuple(baselines[1:]),
        results=tuple(result for rows in results for result in rows),
        device=Device(
            before=before,
            after=after,
            bundle_sha256=bundle.sha256,
            throttled=throttling(before, after),
        ),
    )


def _eval_data(bundle: Bundle, size: OneSize) -> EvalData | None:
    data = bundle.manifest.evaluation
    labels = bundle.labels(size.stored.evaluation)
    if data is None or labels is None:
        return data
    return msgspec.structs.replace(data, label_ids=PackedIds.pack(labels))


def _silent(stage: str, done: int, total: int) -> None:
    """No progress."""
