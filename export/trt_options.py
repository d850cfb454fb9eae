"""What a TensorRT build can be asked for, as plain data that a manifest carries to another machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vit_export.errors import UsageError

FlavorName = Literal["auto", "tensorrt", "rtx"]
Compatibility = Literal["none", "ampere+", "same"]

# Data-centre, Jetson and RTX chips of the last four generations. TensorRT-RTX knows fewer: the build
# takes those its API names and lists the others (Jetson Orin is 8.7, Thor 11.0, Hopper 9.0).
RTX_CAPABILITIES = ("8.6", "8.9", "12.0", "12.1")  # of those, what TensorRT-RTX 1.7 knows
DEFAULT_CAPABILITIES = ("8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")


@dataclass(frozen=True, slots=True)
class TensorRtOptions:
    """How an engine is built. Precision is not here: it is in the graph (strongly typed networks).

    flavor: `tensorrt` (Jetson, data centre), `rtx` (consumer GPUs, builds without one), or what is
        installed, TensorRT first.
    batches: (min, opt, max) images a call; used where the graph's batch is dynamic. Kernels are chosen
        for opt.
    workspace_mib: scratch memory a layer may use, None for the device's.
    optimization_level: 0 (fast build) to 5 (longest search).
    compatibility: which other GPUs may run the engine (`ampere+`: Ampere and newer; `same`: any of
        the same compute capability). version_compatible: later TensorRT versions may run it too.
    tf32: let FP32 products use 10-bit mantissas. Off, so that an FP32 artifact is FP32.
    timing_cache: keep one beside the engine; never with RTX, where it would demand a GPU.
    dla_core: deep learning accelerator to use (GPU for what it cannot run).
    compute_capabilities: chips an RTX engine must run on.
    """

    flavor: FlavorName = "auto"
    batches: tuple[int, int, int] = (1, 1, 16)
    workspace_mib: int | None = None
    optimization_level: int = 3
    compatibility: Compatibility = "none"
    version_compatible: bool = False
    tf32: bool = False
    timing_cache: bool = True
    dla_core: int | None = None
    compute_capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES

    def __post_init__(self) -> None:
        choices(self.flavor, FlavorName, "--trt-flavor")
        choices(self.compatibility, Compatibility, "--trt-compatibility")
        low, opt, high = self.batches
        if not 1 <= low <= opt <= high:
            raise UsageError(
                f"--batch-size {low},{opt},{high} is not a profile",
                "give min,opt,max with 1 <= min <= opt <= max",
            )
        if not 0 <= self.optimization_level <= 5:
            raise UsageError(
                f"TensorRT has no builder optimisation level {self.optimization_level}", "0 to 5"
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"a workspace of {self.workspace_mib} MiB is too small", "give at least 1 MiB")


def choices(value: str, allowed: object, option: str) -> None:
    """Raise UsageError unless `value` is one of a Literal's."""
    names = get_args(allowed)
    if value not in names:
        raise UsageError(f"{option} {value} is unknown", f"one of {', '.join(names)}")
