"""What a measurement was made on: system, processor, cores, memory and the versions of what ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from math import ceil
from pathlib import Path

from vit_export import __version__
from vit_export.runtime.report_schema import Environment

# Distributions whose versions decide numbers, in the order in which reports list them.
PACKAGES = (
    "numpy", "pillow", "torch", "torchvision", "timm", "transformers", "onnx", "onnxscript",
    "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "coremltools",
)  # fmt: skip

# Our names for the instructions that int8 and half precision live on, and theirs in /proc/cpuinfo
# (x86 `flags`, ARM `Features`) and in macOS's sysctl.
CPU_FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "avx512-bf16": ("avx512_bf16",),
    "avx512-fp16": ("avx512_fp16",),
    "amx-int8": ("amx_int8",),
    "amx-bf16": ("amx_bf16",),
    "neon": ("asimd", "neon", "hw.optional.neon", "hw.optional.AdvSIMD"),
    "fp16": ("asimdhp", "hw.optional.arm.FEAT_FP16"),
    "dotprod": ("asimddp", "hw.optional.arm.FEAT_DotProd"),
    "i8mm": ("i8mm", "hw.optional.arm.FEAT_I8MM"),
    "bf16": ("bf16", "hw.optional.arm.FEAT_BF16"),
    "sve": ("sve",),
    "sme": ("sme", "hw.optional.arm.FEAT_SME"),
}


def collect(threads: int = 0) -> Environment:
    """The environment of this process. threads: what runtimes are given, 0 for the physical cores."""
    return Environment(
        os=platform.platform(),
        machine=platform.machine(),
        python=platform.python_version(),
        cpu=cpu_name(),
        cpu_features=cpu_features(),
        cores=physical_cores(),
        threads=threads or physical_cores(),
        memory_bytes=memory_bytes(),
        versions={"vit-export": __version__, **versions()},
    )


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of the distributions that are installed, read from metadata: nothing is imported."""
    found = ((name, installed(name)) for name in packages)
    return {name: version for name, version in found if version is not None}


def installed(package: str) -> str | None:
    """The version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor as its maker calls it, else what Python knows of it."""
    info = _read("/proc/cpuinfo")
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    if match:
        return match[1].strip()
    return _sysctl().get("machdep.cpu.brand_string", "") or platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Which of CPU_FEATURES this processor has."""
    return features_in(_read("/proc/cpuinfo"), _sysctl())


def features_in(cpuinfo: str, sysctl: dict[str, str]) -> tuple[str, ...]:
    """CPU_FEATURES found in the text of /proc/cpuinfo or in macOS's sysctl values."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    present = set(match[1].split()) if match else set()
    present |= {name for name, value in sysctl.items() if value == "1"}
    return tuple(ours for ours, theirs in CPU_FEATURES.items() if present.intersection(theirs))


def physical_cores() -> int:
    """Physical cores this process may use: affinity and the container's CPU quota count, SMT does not."""
    if sys.platform == "darwin":
        return int(_sysctl().get("hw.physicalcpu", 0)) or os.cpu_count() or 1
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return min(len(cores), _quota())


def memory_bytes() -> int | None:
    """Physical memory in bytes, None where the system does not tell."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _siblings(cpu: int) -> str:
    """An id shared by the logical processors of one core."""
    return _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu)


def _quota() -> int:
    """Whole processors the cgroup grants (v2 `cpu.max`, then v1), a large number without a limit."""
    quota, period, *_ = (*_read("/sys/fs/cgroup/cpu.max").split(), "", "")
    if not quota:
        quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
        period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    if not (quota.isdigit() and period.isdigit()):  # "max", -1 or no cgroup at all
        return sys.maxsize
    return max(1, ceil(int(quota) / int(period)))


@cache
def _sysctl() -> dict[str, str]:
    """macOS's `sysctl` values of the processor; empty elsewhere."""
    if platform.system() != "Darwin":
        return {}
    command = ["/usr/sbin/sysctl", "hw", "machdep.cpu"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def _read(path: str) -> str:
    """A small system file, empty if there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
