"""`python -m vit_export.runtime.worker`: one runtime alone in a process, driven by lines on stdin.

A vendor library that prints, crashes, leaks or spins does so here. File descriptor 1 is copied for the
protocol and then pointed at stderr, so that nothing a library prints can be taken for a reply. The
process ends when its stdin does, so a killed parent leaves no worker behind.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from vit_export.artifacts import Images, Pixels, Preprocessing
from vit_export.errors import InputError, MissingExtra, RunnerError, VitExportError
from vit_export.runtime import protocol
from vit_export.runtime.runner import Runner, open_runner

Answer = Callable[[protocol.Reply], None]


class Session:
    """Answers requests with one runner, opened by the first of them. A context manager."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._stack = ExitStack()
        self._runner: Runner | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def runner(self) -> Runner:
        """The open runner. Raises RunnerError if nothing was opened."""
        if self._runner is None:
            raise RunnerError("the worker was asked to work before it was told what to open")
        return self._runner

    def handle(self, request: protocol.Request) -> None:
        """Do what is asked and answer; errors are answers too."""
        try:
            self._answer(self._do(request))
        except MissingExtra as error:
            self._answer(protocol.Missing(error.package, error.extra))
        except VitExportError as error:
            self._answer(protocol.Failed(type(error).__name__, error.message, error.hint))
        except Exception as error:  # noqa: BLE001  (the edge of the process: report it and live on)
            traceback.print_exc()
            self._answer(protocol.Failed("RunnerError", f"{type(error).__name__}: {error}", ""))

    def _do(self, request: protocol.Request) -> protocol.Reply:
        match request:
            case protocol.Open():
                return self._open(request)
            case protocol.Time():
                return self._time(request)
            case protocol.Rate():
                return self._rate(request)
            case protocol.Infer():
                return self._infer(request)
            case protocol.Describe():
                return protocol.Described(dict(self.runner.details(self._sample(request))))
            case protocol.Ask():
                return protocol.Info(self.runner.version, peak_rss_bytes())
            case protocol.Close():
                raise AssertionError("Close ends the loop in serve()")

    def _open(self, request: protocol.Open) -> protocol.Opened:
        began = time.perf_counter()
        self._runner = self._stack.enter_context(open_runner(request.runnable))
        signature = self._runner.signature
        seconds = time.perf_counter() - began
        return protocol.Opened(signature.image_size, signature.batch, self._runner.version, seconds)

    def _time(self, request: protocol.Time) -> protocol.Timed:
        times = self.runner.time(
            self._sample(request),
            warmup=request.warmup,
            runs=request.runs,
            min_seconds=request.min_seconds,
            max_seconds=request.max_seconds,
        )
        return protocol.Timed(times.tolist())

    def _rate(self, request: protocol.Rate) -> protocol.Rated:
        calls, seconds = self.runner.rate(self._sample(request), seconds=request.seconds)
        return protocol.Rated(calls * request.batch, seconds, self.runner.streams)

    def _sample(self, request: protocol.Time | protocol.Rate | protocol.Describe) -> Images:
        """The first `batch` images, repeated if there are fewer, or seeded noise without images."""
        if request.pixels is None or request.preprocessing is None:
            shape = (request.batch, 3, *self.runner.signature.image_size)
            return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        pixels = _pixels(request.pixels, request.preprocessing)
        return request.preprocessing.normalize(pixels[np.arange(request.batch) % len(pixels)])

    def _infer(self, request: protocol.Infer) -> protocol.Inferred:
        pixels = _pixels(request.pixels, request.preprocessing)
        part = request.out.with_name(request.out.name + ".part")
        shape: tuple[int, int] | None = None
        with part.open("wb") as out:  # not a memory map: on a full disk, writing to one is a SIGBUS
            for start in range(0, len(pixels), request.batch):
                chunk = np.asarray(pixels[start : start + request.batch])
                logits = self.runner.infer(request.preprocessing.normalize(chunk), batch=request.batch)
                if shape is None:
                    shape = (len(pixels), logits.shape[1])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(out, header)
                out.write(np.ascontiguousarray(logits, "<f4").data)
                self._answer(protocol.Progress(start + len(chunk), len(pixels)))
        if shape is None:
            raise InputError(f"{request.pixels} holds no image")
        part.replace(request.out)
        return protocol.Inferred(*shape)


def serve(requests: Iterable[bytes], answer: Answer) -> None:
    """Answer each line until Close or the end of the lines. A line that is no request is answered too."""
    with Session(answer) as session:
        for line in requests:
            try:
                request = protocol.decode_request(line)
            except msgspec.DecodeError as error:
                answer(protocol.Failed("RunnerError", f"the worker was sent something else: {error}", ""))
                continue
            if isinstance(request, protocol.Close):
                return
            session.handle(request)


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process in bytes, None where the system does not tell (Windows).

    On Linux from VmHWM: getrusage's ru_maxrss also counts the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _pixels(path: Path, preprocessing: Preprocessing) -> Pixels:
    """Memory-mapped uint8 [N, H, W, 3] of the contract's size. Raises InputError for anything else."""
    try:
        pixels: Pixels = np.lib.format.open_memmap(path, mode="r")  # .npy only, never a pickle
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read images from {path}: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (*preprocessing.size, 3):
        raise InputError(
            f"{path} holds {pixels.dtype} {pixels.shape}, expected uint8 NHWC {preprocessing.size}"
        )
    return pixels


def main() -> None:
    """Serve stdin; see the module."""
    replies = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(replies, "wb", buffering=0) as stream:
        serve(sys.stdin.buffer, lambda reply: (stream.write(protocol.encode(reply)), None)[1])


if __name__ == "__main__":
    main()
