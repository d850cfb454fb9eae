"""What is read off a device and its engine: Jetson state, inspector layers, known-bad versions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vit_export.runtime import trt_jetson
from vit_export.runtime.trt_inspector import int8_fallbacks, reads_int8
from vit_export.runtime.trt_jetson import new_throttling, parse_power, parse_power_mode, read_jetson

TEGRASTATS = (
    "11-23-2026 12:00:00 RAM 3012/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB) CPU [2%@729,0%@729] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 31%@[612] cpu@46.1C gpu@45.2C tj@46.8C "
    "VDD_IN 5090mW/4877mW VDD_CPU_GPU_CV 912mW/870mW VDD_SOC 1391mW/1391mW\n"
)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of an Orin Nano, and its tools on the PATH."""
    thermal, hwmon = "sys/class/thermal", "sys/class/hwmon"
    write(
        tmp_path,
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081\n# more\n",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "sys/class/devfreq/17000000.gpu/cur_freq": "612000000\n",
            "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
            "sys/class/devfreq/13e10000.host1x/cur_freq": "1\n",
            f"{thermal}/thermal_zone0/type": "cpu-thermal\n",
            f"{thermal}/thermal_zone0/temp": "46062\n",
            f"{thermal}/thermal_zone1/type": "gpu-thermal\n",
            f"{thermal}/thermal_zone1/temp": "",  # unreadable while the GPU is off
            f"{thermal}/cooling_device0/type": "pwm-fan\n",
            f"{thermal}/cooling_device0/cur_state": "2\n",
            f"{thermal}/cooling_device1/type": "gpu-throttle-alert\n",
            f"{thermal}/cooling_device1/cur_state": "0\n",
            f"{hwmon}/hwmon1/oc1_event_cnt": "0\n",
            f"{hwmon}/hwmon1/oc3_event_cnt": "17\n",
        },
    )
    tools = tmp_path / "bin"
    write(tools, {"nvpmodel": "#!/bin/sh\necho 'NV Power Mode: 15W'\necho 0\n"})
    write(tools, {"tegrastats": f"#!/bin/sh\nprintf '%s' '{TEGRASTATS}'\nexec sleep 30\n"})
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tmp_path


class TestJetson:
    """Power, clocks and heat."""

    def test_reads_what_the_board_shows(self, orin):
        """Mode, clocks, temperatures, power and throttle counters, in the units the docstring promises."""
        state = read_jetson(orin)
        assert state is not None
        assert state.board == "NVIDIA Jetson Orin Nano Developer Kit"
        assert state.release.startswith("R36")
        assert state.power_mode == "15W"
        assert (state.gpu_mhz, state.gpu_max_mhz) == (612.0, 1020.0)
        assert state.temperatures == {"cpu-thermal": 46.062}
        assert state.power_mw == {"VDD_IN": 5090, "VDD_CPU_GPU_CV": 912, "VDD_SOC": 1391}
        assert state.throttle_events == {"oc1": 0, "oc3": 17}
        assert state.throttled == ()

    def test_only_changes_count_as_throttling(self, orin):
        """Old over-current events are history; a new one, or an active clock limit, is throttling."""
        before = read_jetson(orin)
        assert before is not None
        assert new_throttling(before, before) == ()
        after = replace(before, throttle_events={"oc1": 0, "oc3": 18}, throttled=("gpu-throttle-alert",))
        assert new_throttling(before, after) == ("oc3", "gpu-throttle-alert")

    def test_missing_tools_leave_gaps(self, orin, monkeypatch):
        """Without nvpmodel and tegrastats the rest is still read and nothing is invented."""
        monkeypatch.setattr(trt_jetson.shutil, "which", lambda name: None)
        state = read_jetson(orin)
        assert state is not None
        assert (state.power_mode, state.power_mw) == ("", {})
        assert state.gpu_mhz == 612.0

    def test_elsewhere_there_is_none(self, tmp_path):
        """A machine that is no Jetson has no state."""
        assert read_jetson(tmp_path) is None

    def test_formats(self):
        """The two tools' lines, and lines that say nothing."""
        assert parse_power(TEGRASTATS)["VDD_IN"] == 5090
        assert parse_power("nothing here") == {}
        assert parse_power_mode("NV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER"
        assert parse_power_mode("") == ""


def layer(nodes: list[str], types: list[dict[str, str]], tactic: str = "") -> dict[str, object]:
    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": "__myl_Fc_0", "Metadata": metadata, "Inputs": types, "TacticName": tactic}


class TestInspector:
    """Which int8 layers are not."""

    @pytest.mark.parametrize(
        ("inputs", "tactic", "int8"),
        [
            ([{"Format/Datatype": "Int8"}], "", True),
            ([{"Format/Datatype": "Row major Int8 format"}], "", True),
            ([{"Format": "Row major linear", "DataType": "Int8"}], "", True),
            ([{"Format/Datatype": "Half"}], "sm87_xmma_gemm_i8i8_i8i32_f32_tn", True),
            ([{"Format/Datatype": "Half"}], "sm87_xmma_gemm_f16f16", False),
            ([{"Format": "Row major linear", "DataType": "Half"}], "", False),
            ([], "", False),
        ],
    )
    def test_types_of_both_generations(self, inputs, tactic, int8):
        """TensorRT 10 joins format and type, 11 splits them, and kernels name themselves."""
        assert reads_int8(layer(["a/MatMul"], inputs, tactic)) is int8

    def test_fused_layers_speak_for_each_of_their_products(self):
        """One float16 kernel for two modules is two fallbacks; an int8 one elsewhere redeems a module."""
        layers = [
            layer(["blocks.0.attn.qkv/MatMul", "blocks.0.norm1/LayerNormalization"], [{"DataType": "Half"}]),
            layer(["/blocks.0/mlp/fc1/MatMul", "/blocks.0/mlp/act/Gelu"], [{"DataType": "Half"}]),
            layer(["blocks.1.mlp.fc1/MatMul"], [{"DataType": "Half"}]),
            layer(["blocks.1.mlp.fc1/MatMul"], [{"DataType": "Int8"}]),
        ]
        wanted = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "not.there")
        assert int8_fallbacks(layers, wanted) == ("blocks.0.attn.qkv", "blocks.0.mlp.fc1")

    def test_names_serve_where_metadata_is_missing(self):
        """Older engines join node names by ` + ` instead of listing them as metadata."""
        old = {"Name": "w + /head/fc/Gemm + /act/Relu", "Inputs": [{"Format/Datatype": "Half"}]}
        assert int8_fallbacks([old], ["head.fc"]) == ("head.fc",)
