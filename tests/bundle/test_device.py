"""What sysfs says of clocks, heat and power, on trees laid out as the kernel does."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_export.runtime.device import read_device, throttling
from vit_export.runtime.report_schema import DeviceState


def put(root: Path, **files: str) -> None:
    """Files below `root`; __ in a name stands for /."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_a_linux_board(tmp_path: Path) -> None:
    """kHz become MHz, thousandths of a degree °C and µW mW; zones of one type stay apart."""
    cpu, thermal = "sys__devices__system__cpu__", "sys__class__thermal__"
    put(
        tmp_path,
        **{
            f"{cpu}cpufreq__policy0__scaling_cur_freq": "1500000",
            f"{cpu}cpufreq__policy0__scaling_max_freq": "2400000",
            f"{cpu}cpufreq__policy0__scaling_governor": "ondemand",
            f"{cpu}cpufreq__policy4__scaling_cur_freq": "600000",
            f"{cpu}cpufreq__policy4__scaling_governor": "ondemand",
            f"{thermal}thermal_zone0__type": "cpu-thermal",
            f"{thermal}thermal_zone0__temp": "48312",
            f"{thermal}thermal_zone1__type": "cpu-thermal",
            f"{thermal}thermal_zone1__temp": "-1500",
            "sys__class__hwmon__hwmon2__name": "ina3221",
            "sys__class__hwmon__hwmon2__power1_input": "5090000",
            "sys__class__hwmon__hwmon2__power1_label": "VDD_IN",
            "proc__device-tree__model": "Raspberry Pi 5 Model B Rev 1.0\0",
        },
    )
    state = read_device(tmp_path, "Linux")
    assert state.board == "Raspberry Pi 5 Model B Rev 1.0"
    assert state.governor == "ondemand"
    assert state.mhz == {"cpu0": 1500.0, "cpu4": 600.0}
    assert state.max_mhz == {"cpu0": 2400.0}
    assert state.celsius == {"cpu-thermal": 48.312, "cpu-thermal 1": -1.5}
    assert state.milliwatts == {"ina3221 VDD_IN": 5090.0}
    assert state.unreadable == ()


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_what_cannot_be_read_is_named(tmp_path: Path, system: str) -> None:
    """A virtual machine, macOS and Windows tell nothing: said, not guessed."""
    state = read_device(tmp_path, system)
    assert state == DeviceState(unreadable=("clock", "power", "temperature"))


def test_odd_contents_are_passed_over(tmp_path: Path) -> None:
    """Drivers write errors and empty lines into sysfs; those are values that are not there."""
    put(
        tmp_path,
        sys__class__thermal__thermal_zone0__type="acpi",
        sys__class__thermal__thermal_zone0__temp="<unsupported>",
        sys__devices__system__cpu__cpufreq__policy0__scaling_cur_freq="",
        **{"sys__devices__platform__soc__soc:firmware__get_throttled": "zz"},
    )
    assert read_device(tmp_path, "Linux").unreadable == ("clock", "power", "temperature")


def test_throttling_between_two_readings(tmp_path: Path) -> None:
    """Only counters that moved count, and limits that are active at the end."""
    counter = "sys__devices__system__cpu__cpu0__thermal_throttle__package_throttle_count"
    firmware = "sys__devices__platform__soc__soc:firmware__get_throttled"
    put(tmp_path, **{counter: "7", firmware: "50000"})
    before = read_device(tmp_path, "Linux")
    assert throttling(before, before) == ()
    put(tmp_path, **{counter: "9", firmware: "50005"})
    assert throttling(before, read_device(tmp_path, "Linux")) == ("package throttle",)
