"""The stages of a run whose results are kept: looked up in the store by key, else made and stored."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vit_export import stage_keys
from vit_export.artifacts import BuiltArtifact, EvalSet, Preprocessing, Runnable
from vit_export.calibration.images import ImageSource
from vit_export.calibration.preprocess import write_pixels
from vit_export.errors import RunnerError, VitExportError
from vit_export.runtime.inference import Prediction, predict
from vit_export.runtime.protocol import ProgressCallback
from vit_export.store import Key, Store, plain
from vit_export.workspace import is_full


@dataclass(frozen=True, slots=True)
class Stages:
    """Runs stages, or finds them done. store: None keeps nothing.

    reused, made, keys: names of the stages that were found, of those that ran, and the keys of both.
    answers: predictions that another machine has made, a key for each part of the images, by their name.
    link: artifacts in the store are the user's own files, not copies (a store inside the output folder).
    """

    store: Store | None = None
    link: bool = False
    reused: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    keys: dict[str, Key] = field(default_factory=dict)
    answers: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)

    def once(
        self, name: str, key: Key, folder: Path, make: Callable[[Path], object], *, link: bool = True
    ) -> Any:
        """The stage's note, with its files in `folder`, which is made. `make` fills it and gives the note.

        link: nobody but us will ever write to these files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.store is None:
            note, found = msgspec.to_builtins(make(folder), enc_hook=plain), False
        else:
            note, found = self.store.once(key, folder, make, link=link or self.link)
        (self.reused if found else self.made).append(name)
        self.keys[name] = key
        return note

    def pixels(
        self,
        name: str,
        source: ImageSource,
        contract: Preprocessing,
        folder: Path,
        notify: ProgressCallback | None = None,
    ) -> EvalSet:
        """The preprocessed images of a source."""
        key = _pixels_key(source, contract)
        path, total = folder / "pixels.npy", len(source)
        notify = notify or silent

        def make(_: Path) -> object:
            made = write_pixels(
                source, contract, path, progress=lambda done: notify(f"preprocess {name}", done, total)
            )
            given = None if made.labels is None else made.labels.tolist()
            return {"labels": given, "names": made.names, "skipped": made.skipped}

        return _images(self.once(name, key, folder, make), path, contract, key)

    def in_parts(
        self, name: str, source: ImageSource, contract: Preprocessing, folder: Path, size: int
    ) -> EvalSet:
        """The same in pieces of `size` images; of those in the store, only the first is brought here."""
        sets: list[EvalSet] = []
        for index, part in enumerate(source.parts(size)):
            key, place = _pixels_key(part, contract), folder / str(index)
            entry = self.store.entry(key) if self.store and index else None
            if entry is None:
                sets.append(self.pixels(name, part, contract, place))
            else:
                sets.append(_images(entry.note, place / "pixels.npy", contract, key))
        return joined(sets)

    def predict(
        self,
        name: str,
        runnable: Runnable,
        images: EvalSet,
        folder: Path,
        *,
        batch: int,
        timeout: float,
        notify: ProgressCallback,
        content: str = "",
    ) -> Prediction:
        """What an artifact says of every image. content: its hash, where the file's own would vary."""
        if name in self.answers:
            return self._answered(self.answers[name], folder)
        if images.parts:
            return _together(
                [
                    self.predict(
                        name, runnable, part, folder / str(index), batch=batch, timeout=timeout,
                        notify=notify, content=content,
                    )
                    for index, part in enumerate(images.parts)
                ]
            )  # fmt: skip
        key = stage_keys.key(
            "evaluate",
            artifact=content or stage_keys.runnable_digest(runnable),
            images=images.digest,
            batch=batch,
            machine=stage_keys.machine(),
        )
        out = folder / "logits.npy"

        def make(_: Path) -> object:
            notify(f"evaluate {name}", 0, images.count)
            said = predict(
                runnable, images, out, batch=batch, timeout=timeout,
                progress=lambda _, done, total: notify(f"evaluate {name}", done, total),
            )  # fmt: skip
            return {
                "version": said.version,
                "load_seconds": said.load_seconds,
                "peak_rss_bytes": said.peak_rss_bytes,
                "details": said.details,
            }

        note = self.once(f"evaluate {name}", key, folder, make)
        return _prediction(note, out)

    def _answered(self, keys: tuple[Key, ...], folder: Path) -> Prediction:
        """The predictions of another machine. Raises RunnerError if the store has lost one."""
        parts = []
        for index, key in enumerate(keys):
            place = folder / str(index)
            entry = self.store.get(key, place, link=True) if self.store else None
            if entry is None:
                raise RunnerError(f"the store has lost a part of {folder.name}", "run the sweep again")
            parts.append(_prediction(entry.note, place / "logits.npy"))
        return _together(parts)


def joined(parts: Sequence[EvalSet]) -> EvalSet:
    """One set of several; its pixels are those of the first."""
    first = parts[0]
    labels = [part.labels for part in parts if part.labels is not None]
    return replace(
        first,
        count=sum(part.count for part in parts),
        labels=np.concatenate(labels) if labels else None,
        names=tuple(name for part in parts for name in part.names),
        skipped=tuple(name for part in parts for name in part.skipped),
        digest=stage_keys.digest([part.digest for part in parts]),
        parts=tuple(parts),
    )


def _together(parts: Sequence[Prediction]) -> Prediction:
    """One prediction of parts, in their order: the rows are those of one process."""
    memory = [part.peak_rss_bytes for part in parts if part.peak_rss_bytes is not None]
    return Prediction(
        np.concatenate([part.logits for part in parts]),
        parts[0].version,
        parts[0].load_seconds,
        max(memory) if memory else None,
        parts[0].details,
    )


def _prediction(note: Any, path: Path) -> Prediction:
    return Prediction(np.load(path, mmap_mode="r", allow_pickle=False), **note)


def _pixels_key(source: ImageSource, contract: Preprocessing) -> Key:
    labels = "none" if source.labels is None else stage_keys.digest(source.labels)
    return stage_keys.key("pixels", images=source.digest(), labels=labels, contract=contract)


def _images(note: Any, path: Path, contract: Preprocessing, key: Key) -> EvalSet:
    """The set that a note of `pixels` describes."""
    return EvalSet(
        pixels=path,
        preprocessing=contract,
        count=len(note["names"]),
        labels=None if note["labels"] is None else np.asarray(note["labels"], np.int64),
        names=tuple(note["names"]),
        skipped=tuple(note["skipped"]),
        digest=key.digest,
    )


def artifact_of(note: Any, folder: Path) -> BuiltArtifact:
    """What a build's note says, its path below `folder`."""
    fields = {**note, "path": str(folder / note["path"])}
    return msgspec.convert(fields, BuiltArtifact, dec_hook=lambda _, text: Path(text))


def silent(stage: str, done: int, total: int) -> None:
    """No progress."""


def failure(error: Exception, output: Path) -> str:
    """Why one artifact failed, in words; what would fail every artifact is raised again.

    An error that is not ours is a bug of ours or of a library: the others still get their turn, its
    traceback goes to stderr.
    """
    if is_full(output, error):
        raise error
    if isinstance(error, VitExportError):
        return str(error)
    traceback.print_exception(error)
    return f"internal error: {type(error).__name__}: {error}"
