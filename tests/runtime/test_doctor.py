"""Doctor and environment: what this machine can do, and what is known against it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vit_export.runtime import doctor, environment
from vit_export.runtime.doctor import TARGETS, Sdk, Target, diagnose
from vit_export.runtime.environment import collect, features_in, physical_cores

X86 = "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8 amx_bf16\n"
ARM = "processor : 0\nFeatures\t: fp asimd asimdhp asimddp i8mm bf16 sve\n"
MAC = {"hw.optional.arm.FEAT_DotProd": "1", "hw.optional.arm.FEAT_I8MM": "0", "hw.optional.neon": "1"}


@pytest.mark.parametrize(
    ("cpuinfo", "sysctl", "expected"),
    [
        (X86, {}, ("avx2", "avx512", "vnni", "amx-int8", "amx-bf16")),
        (ARM, {}, ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve")),
        ("", MAC, ("neon", "dotprod")),
        ("", {}, ()),
    ],
)
def test_cpu_features(cpuinfo: str, sysctl: dict[str, str], expected: tuple[str, ...]):
    """What decides int8 speed is read from Linux on x86 and ARM and from macOS, under our names."""
    assert features_in(cpuinfo, sysctl) == expected


def test_environment_of_this_machine():
    """The environment names processor, cores, memory and versions, and threads default to the cores."""
    found = collect()
    assert found.cpu
    assert 1 <= found.cores <= os.cpu_count()
    assert found.threads == found.cores
    assert found.memory_bytes is None or found.memory_bytes > 1 << 28
    assert found.versions["numpy"][0].isdigit()
    assert collect(threads=3).threads == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's topology")
@pytest.mark.parametrize(
    ("siblings", "limit", "cores"),
    [
        ({}, "", 4),  # no topology: each logical processor counts
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, "", 2),
        ({}, "max 100000", 4),
        ({}, "150000 100000", 2),
        ({}, "10000 100000", 1),
    ],
)
def test_physical_cores(monkeypatch: pytest.MonkeyPatch, siblings: dict[int, str], limit: str, cores: int):
    """Hyper-threads count once, and a container's CPU quota, rounded up, is a limit."""
    files = {f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": s for n, s in siblings.items()}
    files["/sys/fs/cgroup/cpu.max"] = limit
    monkeypatch.setattr(environment, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert physical_cores() == cores


def test_diagnosis_without_probing():
    """Each target is diagnosed from metadata; with all SDKs here, onnx and openvino build and run."""
    found = {d.target: d for d in diagnose(probe=False)}
    assert list(found) == [target.name for target in TARGETS]
    assert found["onnx"].builds
    assert found["onnx"].runs
    assert "onnxruntime" in found["onnx"].versions
    if sys.platform != "darwin":
        assert not found["coreml"].runs
        assert "macOS" in found["coreml"].problem


def test_a_missing_sdk_gives_the_command():
    """What is absent is named with the pip command; a target with alternatives takes either."""
    absent, json = Sdk("no-such-dist", "x", "extra-a"), Sdk("numpy", "numpy", "extra-b")
    targets = (
        Target("none", ((absent,),), ((absent,),)),
        Target("half", ((json,), (absent,)), ((json,),)),
        Target("either", ((absent, json),), ((absent, json),)),
    )
    none, half, either = diagnose(probe=False, targets=targets)
    assert (none.builds, none.runs, none.fix) == (False, False, "pip install 'vit-export[extra-a]'")
    assert (half.builds, half.runs) == (False, True)
    assert (either.builds, either.runs, either.problem, either.fix) == (True, True, "", "")


@pytest.mark.parametrize(
    "code", ["raise OSError('libgone.so: no such file')", "import os; os.abort()", "while 1: 0"]
)
def test_an_sdk_that_does_not_load_is_found_out(monkeypatch, tmp_path, code: str):
    """An SDK that raises, crashes or hangs on import is reported and not taken for working."""
    (tmp_path / "broken_sdk.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 1.0)
    broken = Sdk("numpy", "broken_sdk", "b")
    (found,) = diagnose(targets=(Target("t", ((broken,),), ((broken,),)),))
    assert not found.builds
    assert not found.runs
    assert found.notes[0].startswith("numpy does not load: ")


def test_probing_imports_nothing_here():
    """Doctor tries SDKs in other processes: its own has none of them afterwards."""
    code = (
        "import sys; from vit_export.runtime.doctor import diagnose, Target, Sdk\n"
        "sdk = ((Sdk('onnxruntime', 'onnxruntime', 'o'),),)\n"
        "d, = diagnose(targets=(Target('t', sdk, sdk),))\n"
        "assert d.runs, d; assert 'onnxruntime' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
