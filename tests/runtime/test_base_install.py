"""The base install: everything a device needs imports with no SDK in sight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vit_export

BLOCKED = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "openvino", "timm",
           "coremltools", "transformers", "tensorrt", "tensorrt_rtx", "safetensors")  # fmt: skip
ROOT = Path(vit_export.__file__).parent

# A finder before all others that refuses the SDKs, as if none were installed.
BLOCKER = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
"""


# These handle torch programs and are imported only when something is exported.
NEEDS_TORCH = {
    "vit_export.pipeline",
    "vit_export.attention_job",
    "vit_export.kept_cost",
    "vit_export.one_size",
    "vit_export.report_extras",
    "vit_export.blame_size",
    "vit_export.build_size",
    "vit_export.tuning",
    "vit_export.check_size",
    "vit_export.several_sizes",
    "vit_export.calibration.collect",
}


def modules() -> list[str]:
    """Every module of the package outside models/ and export/, but for those that handle torch programs."""
    stages = [ROOT, *(ROOT / name for name in ("runtime", "calibration", "data"))]
    paths = [path for stage in stages for path in stage.glob("*.py") if path.name != "__main__.py"]
    names = (path.relative_to(ROOT).with_suffix("") for path in paths)
    found = {".".join(("vit_export", *name.parts)).removesuffix(".__init__") for name in names}
    return sorted(found - NEEDS_TORCH)


def blocked(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process where no SDK can be imported."""
    command = [sys.executable, "-c", BLOCKER + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_module_imports_without_sdks():
    """runtime/, calibration/ and the top level import on numpy, pillow, msgspec, typer and rich alone."""
    names = modules()
    assert {"vit_export", "vit_export.runtime.gate", "vit_export.runtime.worker"} <= set(names)
    code = (
        f"failed = {{}}\nfor name in {names!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: failed[name] = str(error)\n"
        "sys.exit(repr(failed) if failed else 0)"
    )
    done = blocked(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("runner", ["pytorch", "onnx", "openvino"])
def test_runners_without_sdk_say_what_to_install(runner: str, tmp_path: Path):
    """With no SDK each runner fails with MissingExtra and its pip command."""
    code = (
        "from pathlib import Path; from vit_export.artifacts import Runnable\n"
        "from vit_export.errors import MissingExtra; from vit_export.runtime.runner import open_runner\n"
        f"path = Path({str(tmp_path)!r}) / 'm'; path.touch()\n"
        f"try: open_runner(Runnable({runner!r}, path)).__enter__()\n"
        "except MissingExtra as error: print(error)"
    )
    done = blocked(code)
    assert "pip install 'vit-export[" in done.stdout, done.stderr


def test_a_report_can_be_gated_without_sdks(tmp_path: Path):
    """Reading, gating, printing and writing a report, and doctor, work on a base install."""
    sys_path = str(Path(__file__).parents[1])
    code = (
        f"sys.path.insert(0, {sys_path!r})\nfrom pathlib import Path\n"
        "from contracts.sample_report import report\n"
        "from vit_export.runtime import console, doctor, gate, report_files\n"
        f"out = Path({str(tmp_path)!r}); report_files.write(report(), out)\n"
        "found = gate.gate(report_files.read(out), report_files.read(out))\n"
        "console.print_report(found.report, console.make_console())\n"
        "doctor.diagnose(probe=False)\nprint(found.outcome)"
    )
    done = blocked(code)
    assert done.stdout.strip().endswith("failed"), done.stderr  # the sample has a failed artifact
