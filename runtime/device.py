"""What a device tells about its power, clocks and heat, without root: Linux sysfs, Jetson, Raspberry Pi.

What the system does not expose is named in `unreadable`, never guessed. macOS exposes none of it without
root (powermetrics). Sources: the kernel's ABI documents of thermal, cpufreq, hwmon and throttle counts.
"""

from __future__ import annotations

import platform
import string
from collections.abc import Iterator, Mapping
from pathlib import Path

from vit_export.runtime.report_schema import DeviceState
from vit_export.runtime.trt_jetson import read_jetson

_ROOT = Path("/")


def read_device(root: Path = _ROOT, system: str = "") -> DeviceState:
    """One reading. root: where /proc and /sys are; system: as platform.system(), both for tests."""
    if (system or platform.system()) != "Linux":
        return DeviceState(unreadable=("clock", "power", "temperature"))
    jetson = read_jetson(root)
    clocks, ceilings = _cpu_clocks(root, "scaling_cur_freq"), _cpu_clocks(root, "scaling_max_freq")
    power = {**_hwmon(root, "power", 1e-3), **dict(jetson.power_mw if jetson else {})}
    celsius = {**_hwmon(root, "temp", 1e-3), **_zones(root)}
    if jetson and jetson.gpu_mhz is not None:
        clocks["gpu"] = jetson.gpu_mhz
        ceilings |= {} if jetson.gpu_max_mhz is None else {"gpu": jetson.gpu_max_mhz}
    found = {"clock": clocks, "power": power, "temperature": celsius}
    return DeviceState(
        board=_text(root / "proc/device-tree/model").rstrip("\0"),
        power_mode=jetson.power_mode if jetson else "",
        governor=", ".join(sorted(set(_policies(root, "scaling_governor").values()))),
        mhz=clocks,
        max_mhz=ceilings,
        celsius=celsius,
        milliwatts=power,
        throttle_events={**_throttle_counts(root), **dict(jetson.throttle_events if jetson else {})},
        throttled=jetson.throttled if jetson else (),
        unreadable=tuple(name for name, values in found.items() if not values),
    )


def throttling(before: DeviceState, after: DeviceState) -> tuple[str, ...]:
    """What slowed the device between two readings: counters that moved, limits that are active."""
    moved = (n for n, count in after.throttle_events.items() if count > before.throttle_events.get(n, count))
    return (*moved, *after.throttled)


def _policies(root: Path, name: str) -> Mapping[str, str]:
    """A cpufreq file of every policy: `cpu0` (the first processor it governs) → text."""
    folders = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    read = {f"cpu{folder.name.removeprefix('policy')}": _text(folder / name) for folder in folders}
    return {cpu: text for cpu, text in read.items() if text}


def _cpu_clocks(root: Path, name: str) -> dict[str, float]:
    """MHz by policy; the kernel gives kHz."""
    return {cpu: int(khz) / 1e3 for cpu, khz in _policies(root, name).items() if khz.isdecimal()}


def _zones(root: Path) -> dict[str, float]:
    """°C by thermal zone; the kernel gives thousandths. Zones of one type are numbered."""
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        kind, value = _text(zone / "type"), _number(zone / "temp")
        if kind and value is not None:
            found[kind if kind not in found else f"{kind} {zone.name.removeprefix('thermal_zone')}"] = (
                value / 1e3
            )
    return found


def _hwmon(root: Path, kind: str, scale: float) -> dict[str, float]:
    """Sensors `chip label` → value: temp*_input in m°C, power*_input or _average in µW, times `scale`."""
    return {
        name: value * scale
        for chip in sorted((root / "sys/class/hwmon").glob("hwmon*"))
        for name, value in _sensors(chip, kind)
    }


def _sensors(chip: Path, kind: str) -> Iterator[tuple[str, int]]:
    for sensor in sorted({*chip.glob(f"{kind}*_input"), *chip.glob(f"{kind}*_average")}):
        stem = sensor.name.rpartition("_")[0]
        value = _number(sensor)
        if value is not None:
            yield f"{_text(chip / 'name') or chip.name} {_text(chip / f'{stem}_label') or stem}", value


def _throttle_counts(root: Path) -> dict[str, int]:
    """Thermal throttle events since boot of the first package (x86) and the Pi's firmware flags."""
    places = {
        "package throttle": "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count",
        "core throttle": "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
    }
    read = {name: _number(root / place) for name, place in places.items()}
    flags = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if flags and all(letter in string.hexdigits for letter in flags):
        read["firmware throttle flags"] = int(flags, 16) >> 16  # the bits that stay set until a reboot
    return {name: value for name, value in read.items() if value is not None}


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
