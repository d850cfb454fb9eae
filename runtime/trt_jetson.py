"""The state of a Jetson that decides its speed: power mode, clocks, temperatures, throttling.

Everything is read without root where the board allows it; what cannot be read is absent, never guessed.
Sources: NVIDIA Jetson Linux developer guide (tegrastats, nvpmodel, soctherm over-current events).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class JetsonState:
    """One reading. gpu_mhz, gpu_max_mhz: now and the ceiling of the power mode, None when not readable.

    temperatures: °C by zone (`gpu-thermal`). power_mw: by rail (`VDD_IN`), from tegrastats.
    throttle_events: over-current events since boot by counter; only a change during a run says
    something. throttled: cooling devices that limit a clock now.
    """

    board: str
    release: str
    power_mode: str = ""
    gpu_mhz: float | None = None
    gpu_max_mhz: float | None = None
    temperatures: Mapping[str, float] = field(default_factory=dict)
    power_mw: Mapping[str, int] = field(default_factory=dict)
    throttle_events: Mapping[str, int] = field(default_factory=dict)
    throttled: tuple[str, ...] = ()


def read_jetson(root: Path = _ROOT) -> JetsonState | None:
    """Read the board's state, None on anything but a Jetson. Takes about 0.3 s (one tegrastats line).

    root: where /proc and /sys are, for tests.
    """
    release = _text(root / "etc/nv_tegra_release")
    board = _text(root / "proc/device-tree/model").rstrip("\0")
    if not release and "Jetson" not in board:
        return None
    stats = _tegrastats_line()
    current, ceiling = _gpu_clock(root)
    return JetsonState(
        board=board,
        release=release.splitlines()[0].lstrip("# ") if release else "",
        power_mode=_power_mode(),
        gpu_mhz=current,
        gpu_max_mhz=ceiling,
        temperatures=_temperatures(root),
        power_mw=parse_power(stats),
        throttle_events=_throttle_events(root),
        throttled=_throttled(root),
    )


def new_throttling(before: JetsonState, after: JetsonState) -> tuple[str, ...]:
    """What slowed the board between two readings: over-current counters that moved, active limits."""
    moved = (n for n, count in after.throttle_events.items() if count > before.throttle_events.get(n, 0))
    return (*moved, *after.throttled)


def parse_power(line: str) -> Mapping[str, int]:
    """Rails of a tegrastats line: `VDD_IN 5090mW/5090mW` (now / average) → {"VDD_IN": 5090}."""
    return {rail: int(now) for rail, now in re.findall(r"(\w+) (\d+)mW/\d+mW", line)}


def parse_power_mode(text: str) -> str:
    """`NV Power Mode: MAXN_SUPER` of `nvpmodel -q` → `MAXN_SUPER`."""
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found[1] if found else ""


def _power_mode() -> str:
    return parse_power_mode(_run(["nvpmodel", "-q"], seconds=5.0))


def _tegrastats_line() -> str:
    """The first line tegrastats prints; it never ends by itself."""
    lines = _run(["tegrastats", "--interval", "200"], seconds=1.0).splitlines()
    return lines[0] if lines else ""


def _run(command: list[str], seconds: float) -> str:
    """Output of a tool, cut off after `seconds`; "" where it is missing or may not run."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        return output.decode(errors="replace") if isinstance(output, bytes) else output
    except OSError:
        return ""
    return done.stdout


def _gpu_clock(root: Path) -> tuple[float | None, float | None]:
    """(current, ceiling) MHz of the GPU's devfreq node: `17000000.gpu` on Orin, `gpu-gpc-0` on Thor."""
    for node in sorted((root / "sys/class/devfreq").glob("*gpu*")):
        current, ceiling = _text(node / "cur_freq"), _text(node / "max_freq")
        if current.isdecimal():
            return int(current) / 1e6, int(ceiling) / 1e6 if ceiling.isdecimal() else None
    return None, None


def _temperatures(root: Path) -> Mapping[str, float]:
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    read = {_text(zone / "type"): _text(zone / "temp") for zone in zones}
    return {name: int(milli) / 1000 for name, milli in read.items() if name and milli.lstrip("-").isdecimal()}


def _throttle_events(root: Path) -> Mapping[str, int]:
    counters = sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"))
    read = {counter.name.removesuffix("_event_cnt"): _text(counter) for counter in counters}
    return {name: int(count) for name, count in read.items() if count.isdecimal()}


def _throttled(root: Path) -> tuple[str, ...]:
    """Cooling devices in a state above 0 that are not fans: those take clock, not noise."""
    devices = sorted((root / "sys/class/thermal").glob("cooling_device*"))
    active = [_text(d / "type") for d in devices if _text(d / "cur_state") not in ("", "0")]
    return tuple(name for name in active if "fan" not in name)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
