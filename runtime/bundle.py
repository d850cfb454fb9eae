"""A folder that carries everything a device needs to judge its artifacts without PyTorch.

```
bundle/manifest.json                      what is here and its SHA-256 (bundle_manifest.py)
       plan.json                          what was quantised and why
       TARGET/PRECISION/SIZE/...          artifacts, hard links to those in the output folder
       golden/SIZE/{pixels,logits}.npy    at least 16 evaluation images with FP32 outputs
       images/SIZE/{pixels,logits,labels}.npy   an evaluation subset, the same
```
Pixels are uint8 NHWC as the contract in the manifest made them, so a device normalises but never resizes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from vit_export.artifacts import EvalSet, Logits, Precision, Runnable
from vit_export.errors import UsageError
from vit_export.python310 import sha256_of
from vit_export.runtime import bundle_manifest
from vit_export.runtime.bundle_manifest import (
    Manifest,
    StoredArtifact,
    StoredFile,
    StoredImages,
    StoredSize,
)
from vit_export.runtime.bundle_open import Bundle
from vit_export.runtime.files import atomic_directory
from vit_export.runtime.report_schema import Baseline, EvalData, Report, Result

GOLDEN_IMAGES = 16
DEFAULT_IMAGES = 256

# Files that two identical exports do not write alike, by target, as globs below the artifact's folder.
VARIES: Mapping[str, tuple[str, ...]] = {
    "tensorrt": ("*.engine", "*.timing", "*.trt.json"),  # kernels are chosen by timing; times are stored
}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment a zip can hold


@dataclass(frozen=True, slots=True, eq=False)
class SizeImages:
    """What one image size brings.

    logits: the baseline's float32 [N, K] for all of `images`. runnables: how each artifact is opened, by
    `Result.name`.
    """

    images: EvalSet
    logits: Logits
    baseline: Baseline
    runnables: Mapping[str, Runnable]


def write_bundle(
    report: Report,
    sizes: Sequence[SizeImages],
    output: Path,
    *,
    images: int = DEFAULT_IMAGES,
    batch_size: int | None = None,
    zipped: bool = False,
) -> Path:
    """Write `output/bundle` (and `output/bundle.zip`) from the artifacts of `report` below `output`.

    images: how many evaluation images it carries at most, spread evenly over all of them.
    Raises UsageError if the place cannot be written.
    """
    target = output / "bundle"
    with atomic_directory(target) as folder:
        stored = tuple(_store_size(size, folder, images) for size in sizes)
        artifacts = tuple(_artifacts(report, sizes))
        for artifact in artifacts:
            _link_tree(output, folder, Path(artifact.path).parent)
        plans = tuple(_store_plans(report, output, folder))
        manifest = Manifest(
            model=report.model,
            evaluation=_evaluation(report, stored[0], folder),
            sizes=stored,
            artifacts=artifacts,
            files=tuple(_files(folder)),
            plans=plans,
            versions=report.environment.versions,
            varies=tuple(sorted({n for artifact in artifacts for n in _varying(artifact, folder)})),
            batch_size=batch_size,
        )
        (folder / bundle_manifest.NAME).write_bytes(bundle_manifest.encode(manifest))
    if zipped:
        write_zip(target, output / "bundle.zip")
    return target


def subset(bundle: Bundle, chosen: Sequence[StoredArtifact], folder: Path) -> Bundle:
    """The bundle with these of its artifacts only, made in `folder` out of links to its files.

    With all of them it is the bundle itself. Images of sizes that no chosen artifact has stay behind.
    """
    old = bundle.manifest
    if tuple(chosen) == old.artifacts:
        return bundle
    sizes = tuple(s for s in old.sizes if any(a.image_size == s.image_size for a in chosen))
    places = {Path(artifact.path).parent.as_posix() for artifact in chosen}
    places |= {Path(i.pixels).parent.as_posix() for s in sizes for i in (s.golden, s.evaluation)}
    kept = tuple(f for f in old.files if f.path in old.plans or any(map(places.__contains__, _above(f.path))))
    names = {file.path for file in kept}
    manifest = msgspec.structs.replace(
        old,
        sizes=sizes,
        artifacts=tuple(chosen),
        files=kept,
        varies=tuple(name for name in old.varies if name in names),
    )
    for file in kept:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        _link(bundle.path(file.path), folder / file.path)
    data = bundle_manifest.encode(manifest)
    (folder / bundle_manifest.NAME).write_bytes(data)
    return Bundle(folder, manifest, hashlib.sha256(data).hexdigest())


def _above(name: str) -> Iterator[str]:
    """The folders that a file is in, nearest first."""
    return (parent.as_posix() for parent in Path(name).parents)


def write_zip(folder: Path, path: Path) -> None:
    """One .zip of a bundle: sorted, dated 1980 and stored, so that its bytes depend on the bundle only.

    Not compressed: weights hardly shrink, and zlib versions would write different bytes.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for source in sorted(p for p in folder.rglob("*") if p.is_file()):
                info = zipfile.ZipInfo(source.relative_to(folder).as_posix(), _EPOCH)
                info.external_attr = 0o100644 << 16
                info.file_size = source.stat().st_size
                with source.open("rb") as content, archive.open(info, "w") as member:
                    shutil.copyfileobj(content, member, 1 << 20)
        part.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "free some space") from error
    finally:
        part.unlink(missing_ok=True)


def _artifacts(report: Report, sizes: Sequence[SizeImages]) -> Iterator[StoredArtifact]:
    """Every result that left an artifact, also one that this machine could not run."""
    opened = {name: runnable for size in sizes for name, runnable in size.runnables.items()}
    for result in report.results:
        if result.artifact is None or result.name not in opened:
            continue
        yield StoredArtifact(
            target=result.target,
            precision=result.precision,
            image_size=result.image_size,
            path=Path(result.artifact).as_posix(),
            bytes=result.bytes or 0,
            runner=opened[result.name].runner,
            options=dict(opened[result.name].options),
            kept_float=result.kept_float,
            float_fallback_ops=result.float_fallback_ops,
            sqnr_db=_expected(result),
        )


def _expected(result: Result) -> float | None:
    """SQNR of the artifact here; of the graph it is made from where it could not run."""
    graph = result.details.get("graph", {}) if result.status == "not_run" else {}
    found = result.sqnr_db if result.sqnr_db is not None else graph.get("sqnr_db")
    return None if found is None else round(found, 2)


def _store_size(size: SizeImages, folder: Path, images: int) -> StoredSize:
    contract = size.images.preprocessing
    evaluation = _spread(size.images.count, max(images, GOLDEN_IMAGES))
    golden = evaluation[_spread(len(evaluation), GOLDEN_IMAGES)]
    return StoredSize(
        preprocessing=contract,
        preprocessing_sha256=contract.digest(),
        golden=_store_images(size, golden, folder, "golden"),
        evaluation=_store_images(size, evaluation, folder, "images"),
        runtime=size.baseline.runtime,
        runtime_version=size.baseline.runtime_version,
    )


def _spread(count: int, wanted: int) -> npt.NDArray[np.int64]:
    """`wanted` of `count` indices, ascending and evenly spaced, so that images sorted by class stay mixed."""
    wanted = min(count, wanted)
    return np.arange(wanted, dtype=np.int64) * count // wanted


def _store_images(size: SizeImages, indices: npt.NDArray[np.int64], folder: Path, kind: str) -> StoredImages:
    height, width = size.images.preprocessing.size
    place = f"{kind}/{height}x{width}"
    (folder / place).mkdir(parents=True)
    pixels = np.load(size.images.pixels, mmap_mode="r", allow_pickle=False)
    out = np.lib.format.open_memmap(
        folder / place / "pixels.npy", mode="w+", dtype=np.uint8, shape=(len(indices), *pixels.shape[1:])
    )
    for row, index in enumerate(indices):  # one image at a time: a subset may be larger than memory
        out[row] = pixels[index]
    out.flush()
    np.save(folder / place / "logits.npy", np.ascontiguousarray(size.logits[indices], np.float32))
    labels = size.images.labels
    if labels is not None:
        np.save(folder / place / "labels.npy", np.ascontiguousarray(labels[indices], np.int64))
    return StoredImages(
        images=len(indices),
        pixels=f"{place}/pixels.npy",
        logits=f"{place}/logits.npy",
        labels=None if labels is None else f"{place}/labels.npy",
    )


def _evaluation(report: Report, size: StoredSize, folder: Path) -> EvalData | None:
    """The images as the device's report names them.

    With all of them on board the digest is that of the export's report, so that `gate` may compare the
    two reports image by image; a subset has the digest of its pixels.
    """
    data = report.data.eval
    if data is None:
        return None
    whole = size.evaluation.images == data.images
    digest = data.sha256 if whole else sha256_of(folder / size.evaluation.pixels)
    return EvalData(
        path=Path(data.path).name,
        images=size.evaluation.images,
        sha256=digest,
        skipped=data.skipped,
        labels=data.labels,
    )


def _store_plans(report: Report, output: Path, folder: Path) -> Iterator[str]:
    """The plans of this run: `plan.json`, or one a size."""
    sizes = {result.image_size for result in report.results if result.precision is Precision.INT8}
    for name in ("plan.json", *(f"plan-{h}x{w}.json" for h, w in sorted(sizes))):
        if sizes and (output / name).is_file():
            shutil.copyfile(output / name, folder / name)
            yield name


def _link_tree(output: Path, folder: Path, place: Path) -> None:
    """The artifact's folder with hard links to its files, or copies across file systems."""
    for source in sorted((output / place).rglob("*")):
        target = folder / source.relative_to(output)
        if source.is_file() and not source.name.startswith(".") and not target.exists():  # results may share
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _files(folder: Path) -> Iterator[StoredFile]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        bundle_manifest.check_name(name, "the output folder")
        yield StoredFile(path=name, bytes=path.stat().st_size, sha256=sha256_of(path))


def _varying(artifact: StoredArtifact, folder: Path) -> Iterator[str]:
    for pattern in VARIES.get(artifact.target, ()):
        for path in (folder / artifact.path).parent.rglob(pattern):
            yield path.relative_to(folder).as_posix()
