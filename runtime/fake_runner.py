"""A runtime that needs no SDK and does what it is told: for tests, demos and dry runs of a pipeline.

Its logits are a fixed function of the images (a seeded projection of a 4x4 average pooling), so two fake
runners with one seed agree to the bit, and `noise` moves one away from the other by a known amount.

    Runnable("fake", Path("-"), options={"image_size": [32, 32], "delay_ms": 5.0})
    Runnable("fake", Path("-"), options={"image_size": [32, 32], "fault": "crash", "fault_after": 3})
"""

from __future__ import annotations

import os
import signal
import time
from typing import ClassVar, Literal

import msgspec
import numpy as np

from vit_export import __version__
from vit_export.artifacts import Images, Logits
from vit_export.errors import MissingExtra
from vit_export.runtime.runner import Runner, Signature

_POOL = 4


class FakeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the fake does.

    image_size: (height, width) it takes, at least 4x4. batch: fixed batch, None for any.
    classes: columns of its output. seed: of the projection; noise: standard deviation added to the
    logits, a fixed function of the image too. delay_ms: least time of one call.
    fault: what goes wrong, fault_at: when; `infer` counts the calls before it in `fault_after`.
    """

    image_size: tuple[int, int] = (32, 32)
    batch: int | None = None
    classes: int = 10
    seed: int = 0
    noise: float = 0.0
    delay_ms: float = 0.0
    fault: Literal["none", "error", "crash", "exit", "hang", "nan", "shape", "missing", "print"] = "none"
    fault_at: Literal["open", "infer"] = "infer"
    fault_after: int = 0


class FakeRunner(Runner):
    """Deterministic logits, a chosen delay, and a chosen fault. Reads no file."""

    package: ClassVar[str] = "fake"
    extra: ClassVar[str] = "fake"
    needs_file: ClassVar[bool] = False

    @property
    def version(self) -> str:
        """`fake` and the version of vit-export it ships with."""
        return f"fake {__version__}"

    def _open(self) -> Signature:
        self._choice = self._options(FakeOptions)
        self._calls = 0
        rng = np.random.default_rng(self._choice.seed)
        self._weight = rng.standard_normal((3 * _POOL * _POOL, self._choice.classes)).astype(np.float32)
        if self._choice.fault_at == "open":
            self._break()
        return Signature(self._choice.image_size, self._choice.batch)

    def _infer(self, images: Images) -> Logits:
        start = time.perf_counter()
        due = self._choice.fault_at == "infer" and self._calls >= self._choice.fault_after
        self._calls += 1
        if due:
            self._break()
        logits = self._logits(images)
        time.sleep(max(0.0, self._choice.delay_ms * 1e-3 - (time.perf_counter() - start)))
        if due and self._choice.fault == "nan":
            logits[0, 0] = np.nan
        return logits[:, :, None] if due and self._choice.fault == "shape" else logits

    def _logits(self, images: Images) -> Logits:
        pooled = _pool(images)
        # One product an image, so that the result cannot depend on the batch.
        logits = np.stack([row @ self._weight for row in pooled])
        if self._choice.noise:
            phase = pooled.sum(axis=1, keepdims=True) * 1e3 + np.arange(logits.shape[1])
            # Deterministic and zero-mean over images, with the standard deviation asked for.
            logits += (self._choice.noise * np.sqrt(2.0) * np.sin(phase)).astype(np.float32)
        return logits

    def _break(self) -> None:
        """Do what `fault` says, if it is something that happens rather than something returned."""
        match self._choice.fault:
            case "error":
                raise RuntimeError("the fake runner was told to fail")
            case "missing":
                raise MissingExtra(self.package, self.extra)
            case "crash":
                os.kill(os.getpid(), getattr(signal, "SIGSEGV", signal.SIGTERM))
            case "exit":
                os.write(2, b"fake: cannot go on\n")
                os._exit(7)
            case "hang":
                time.sleep(3600)
            case "print":
                os.write(1, b'{"garbage": on stdout\n')


def _pool(images: Images) -> Images:
    """Average of each cell of a 4x4 grid: [N, 3, H, W] to [N, 48]; rows and columns beyond are cut."""
    count, channels, height, width = images.shape
    rows, columns = height // _POOL, width // _POOL
    cells = images[:, :, : rows * _POOL, : columns * _POOL].reshape(
        count, channels, _POOL, rows, _POOL, columns
    )
    pooled: Images = cells.mean(axis=(3, 5), dtype=np.float32).reshape(count, -1)
    return pooled
