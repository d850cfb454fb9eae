"""Which targets can be built and run on this machine, and what is known to be wrong with it.

Installed versions come from package metadata. Whether an SDK really loads is tried in a process of its
own, because a vendor library built for another system may crash rather than raise.
"""

from __future__ import annotations

import ctypes.util
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_export.python310 import code_command
from vit_export.runtime.environment import installed
from vit_export.runtime.known_bad import problems

PROBE_SECONDS = 120.0
_TEGRA = Path("/etc/nv_tegra_release")


@dataclass(frozen=True, slots=True)
class Sdk:
    """A package: its distribution, the module to import and the extra of ours that installs it."""

    package: str
    module: str
    extra: str


@dataclass(frozen=True, slots=True)
class Target:
    """What a target needs. build, run: one of each inner tuple. missing: why this system cannot run it."""

    name: str
    build: tuple[tuple[Sdk, ...], ...]
    run: tuple[tuple[Sdk, ...], ...]
    missing: Callable[[], str] = lambda: ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One target here. problem: what stands in the way, `fix` the command against it. notes: known faults."""

    target: str
    builds: bool
    runs: bool
    versions: Mapping[str, str]
    problem: str = ""
    fix: str = ""
    notes: tuple[str, ...] = ()


def _no_mac() -> str:
    return "" if platform.system() == "Darwin" else "runs on macOS only; here only the reference interpreter"


def _no_nvidia() -> str:
    """TensorRT builds (RTX) without a GPU, but running needs the driver's library."""
    if ctypes.util.find_library("cuda") or ctypes.util.find_library("nvcuda"):
        return ""
    return "needs an NVIDIA GPU and driver to run"


_TORCH = Sdk("torch", "torch", "export")
_ONNX = Sdk("onnx", "onnx", "export")
_ONNXSCRIPT = Sdk("onnxscript", "onnxscript", "export")
_ORT = Sdk("onnxruntime", "onnxruntime", "onnxruntime")
_OPENVINO = Sdk("openvino", "openvino", "openvino")
_COREML = Sdk("coremltools", "coremltools", "coreml")
_TENSORRT = (Sdk("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx"), Sdk("tensorrt", "tensorrt", "tensorrt"))
_GRAPH = ((_TORCH,), (_ONNX,), (_ONNXSCRIPT,))

TARGETS = (
    Target("onnx", _GRAPH, ((_ORT,),)),
    Target("openvino", (*_GRAPH, (_OPENVINO,)), ((_OPENVINO,),)),
    Target("tensorrt", (*_GRAPH, _TENSORRT), (_TENSORRT,), _no_nvidia),
    Target("coreml", ((_TORCH,), (_COREML,)), ((_COREML,),), _no_mac),
)


def diagnose(*, probe: bool = True, targets: Sequence[Target] = TARGETS) -> tuple[Diagnosis, ...]:
    """Look at each target. probe: also import every SDK involved, each in a process of its own."""
    sdks = {sdk for target in targets for group in (*target.build, *target.run) for sdk in group}
    present = {sdk: version for sdk in sdks if (version := installed(sdk.package)) is not None}
    broken = _probe(present) if probe else {}
    return tuple(_diagnosis(target, present, broken) for target in targets)


def _diagnosis(target: Target, present: Mapping[Sdk, str], broken: Mapping[Sdk, str]) -> Diagnosis:
    working = present.keys() - broken.keys()
    lacking_build = _lacking(target.build, working)
    lacking_run = _lacking(target.run, working)
    lacking = list(dict.fromkeys((*lacking_run, *lacking_build)))
    system = target.missing()
    used = {sdk for group in (*target.build, *target.run) for sdk in group if sdk in present}
    versions = {sdk.package: present[sdk] for sdk in sorted(used, key=lambda sdk: sdk.package)}
    unloadable = (f"{sdk.package} does not load: {broken[sdk]}" for sdk in used & broken.keys())
    names = ", ".join(sdk.package for sdk in lacking)
    return Diagnosis(
        target=target.name,
        builds=not lacking_build,
        runs=not lacking_run and not system,
        versions=versions,
        problem="; ".join(filter(None, (f"{names} missing" if lacking else "", system))),
        fix=_pip(lacking),
        notes=(*sorted(unloadable), *problems(versions, jetson=_TEGRA.exists())),
    )


def _lacking(groups: Iterable[tuple[Sdk, ...]], working: Iterable[Sdk]) -> list[Sdk]:
    """The first of each group of which none works."""
    have = set(working)
    return [group[0] for group in groups if not have.intersection(group)]


def _pip(lacking: Sequence[Sdk]) -> str:
    extras = ",".join(dict.fromkeys(sdk.extra for sdk in lacking))
    return f"pip install 'vit-export[{extras}]'" if extras else ""


def _probe(sdks: Iterable[Sdk]) -> dict[Sdk, str]:
    """Import each SDK in its own process, all at once; those that fail, with the last line they said."""
    started = {sdk: _start(sdk) for sdk in sdks}
    return {sdk: reason for sdk, process in started.items() if (reason := _ending(process))}


def _start(sdk: Sdk) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        code_command(f"import {sdk.module}"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _ending(process: subprocess.Popen[bytes]) -> str:
    """Why an import failed; empty if it did not."""
    try:
        _, stderr = process.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"the import took longer than {PROBE_SECONDS:g} s"
    if process.returncode == 0:
        return ""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"the import ended with {process.returncode}"
