"""The default model's bundle on a device: the base wheel and onnxruntime in an empty environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vit_export.runtime import report_files
from vit_export.runtime.bundle_open import open_bundle

HEAVY = ("torch", "torchvision", "timm", "onnx", "transformers", "safetensors", "onnxscript", "onnx_ir")

# Runs the command in this process and in its workers alike with a record of what was imported.
WATCH = f"""
import atexit, os, sys
def note():
    with open(os.environ["IMPORTED"], "a") as file:
        heavy = " ".join(name for name in {HEAVY!r} if name in sys.modules)
        print(heavy, "onnxruntime" in sys.modules, sep="|", file=file)
atexit.register(note)
"""


def verify(python: Path, *arguments: object, cwd: Path, **variables: str) -> Any:
    """`vit-export verify` as a device's user types it, with no variables of ours."""
    return subprocess.run(
        [python.with_name("vit-export"), "verify", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **variables},
    )  # fmt: skip


def test_verifies_without_torch(device_export: Any, device_python: Path, tmp_path: Path) -> None:
    """The zip is verified with neither torch, timm nor onnx installed, let alone imported."""
    site = next((device_python.parents[1] / "lib").glob("python*/site-packages"))
    assert not [name for name in HEAVY if (site / name).exists()]
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    imported = tmp_path / "imported"
    done = verify(
        device_python, device_export.zipped, "--output", "here",
        cwd=tmp_path, PYTHONPATH=str(tmp_path), IMPORTED=str(imported),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = imported.read_text().splitlines()
    assert len(lines) >= 3  # the command and its workers
    assert {line.partition("|")[0] for line in lines} == {""}
    assert any(line.endswith("|True") for line in lines)

    report = report_files.read(tmp_path / "here")
    (result,) = report.results
    assert (result.status, result.images, result.top1_drop) == ("ok", 30, 0.0)
    assert result.sqnr_db is not None and result.sqnr_db > 30
    assert result.latency_ms is not None and result.latency_ms.runs >= 50
    assert "torch" not in report.environment.versions
    assert not list((tmp_path / "here").glob(".*"))


def test_an_absent_runtime_is_not_run(device_export: Any, device_python: Path, tmp_path: Path) -> None:
    """Without the only runtime there is a row with the command that installs it, and exit code 3."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['onnxruntime'] = None")
    place = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path)}
    done = verify(device_python, device_export.bundle, "--output", "here", **place)
    assert done.returncode == 3, done.stderr
    (result,) = report_files.read(tmp_path / "here").results
    assert result.status == "not_run"
    assert "pip install 'vit-export[onnxruntime]'" in result.reason


def test_tampered_artifact_exits_with_2(device_export: Any, device_python: Path, tmp_path: Path) -> None:
    """One changed byte in the model, or a path out of the folder: exit 2, one line, nothing written."""
    bundle = Path(shutil.copytree(device_export.bundle, tmp_path / "bundle"))
    model = bundle / "onnx" / "int8" / "96x96" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 0xFF
    model.write_bytes(data)
    done = verify(device_python, bundle, cwd=tmp_path)
    assert done.returncode == 2
    assert "SHA-256 differs" in done.stderr
    assert "Traceback" not in done.stderr

    evil = tmp_path / "evil.zip"
    shutil.copyfile(device_export.zipped, evil)
    with zipfile.ZipFile(evil, "a") as archive:
        archive.writestr("../../escaped", "x")
    done = verify(device_python, evil, cwd=tmp_path)
    assert done.returncode == 2
    assert "../../escaped" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "evil.zip"]


def _contents(path: Path) -> dict[str, tuple[int, int]]:
    """Checksum and size of each member of a zip."""
    with zipfile.ZipFile(path) as archive:
        return {member.filename: (member.CRC, member.file_size) for member in archive.infolist()}


@pytest.mark.slow
def test_a_second_export_gives_the_same_bundle(
    device_export: Any, export_with: Callable[..., Any], tmp_path: Path
) -> None:
    """The same export in another folder gives the same zip, to the byte."""
    again = export_with(tmp_path / "again")
    assert open_bundle(again.bundle, tmp_path).manifest.varies == ()
    assert _contents(again.zipped) == _contents(device_export.zipped)
    same = again.zipped.read_bytes() == device_export.zipped.read_bytes()
    assert same  # not compared in the assertion itself: pytest would explain megabytes


def test_the_base_install_has_wheels_for_arm(device_python: Path, wheel: Path) -> None:
    """pip resolves the base install, ONNX Runtime and OpenVINO to wheels for 64-bit ARM Linux (Debian 12)."""
    platforms = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in range(17, 37)]
    done = subprocess.run(
        [
            device_python, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report=-",
            "--target=unused", "--only-binary=:all:", "--python-version=3.11", "--implementation=cp",
            "--platform=manylinux2014_aarch64", *platforms,
            f"vit-export[onnxruntime,openvino] @ {wheel.as_uri()}",
        ],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    urls = [item["download_info"]["url"] for item in json.loads(done.stdout)["install"]]
    compiled = [url for url in urls if not url.endswith("none-any.whl")]
    assert {"numpy", "pillow", "msgspec", "onnxruntime"} <= {url.split("/")[-1].split("-")[0] for url in urls}
    assert all("aarch64" in url for url in compiled)
