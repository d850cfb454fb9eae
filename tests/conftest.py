"""What several areas share: the command line in this process, one export, an environment like a device's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from vit_export.runtime.latency import alternate

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores; torch is not imported yet

ROOT = Path(__file__).parents[1]
BUNDLE_IMAGES = 30
EVAL_IMAGES = 300


@dataclass(frozen=True)
class Run:
    """What a command did."""

    code: int
    out: str
    err: str


class Command(Protocol):
    """Runs `vit-export` with arguments."""

    def __call__(self, *arguments: object) -> Run: ...


@pytest.fixture
def vit_export(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`vit-export ARGUMENTS` in this process."""

    def run(*arguments: object) -> Run:
        from vit_export import cli

        monkeypatch.setattr(sys, "argv", ["vit-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return Run(int(stop.value.code or 0), out, err)

    return run


@dataclass(frozen=True)
class Export:
    """An export's output folder and its bundle."""

    output: Path

    @property
    def bundle(self) -> Path:
        return self.output / "bundle"

    @property
    def zipped(self) -> Path:
        return self.output / "bundle.zip"


def run_export(output: Path, checkpoint: Path | None = None) -> Export:
    """The default model in int8 for ONNX Runtime, judged on 300 images.

    Timed briefly: no test that uses it looks at a time.
    """
    from vit_export import one_size, pipeline
    from vit_export.artifacts import Precision
    from vit_export.job import ExportJob
    from vit_export.models.config import LoadOptions
    from vit_export.search.choices import Choices

    def brief(runnables: Any, **settings: Any) -> Any:
        return alternate(runnables, **settings, rounds=1, warmup=1, runs=3, min_seconds=0.0)

    job = ExportJob(
        load=LoadOptions(checkpoint=checkpoint), targets=("onnx",), precisions=(Precision.INT8,),
        choices=Choices(), eval_size=EVAL_IMAGES, bundle_images=BUNDLE_IMAGES, zipped=True, output=output,
        attention=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_size, "alternate", brief)
        pipeline.run(job, "vit-export --int8")
    return Export(output)


@pytest.fixture(scope="session")
def device_export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """digits-vit for ONNX Runtime, with a bundle of 30 images."""
    return run_export(tmp_path_factory.mktemp("device") / "out")


@pytest.fixture(scope="session")
def export_with() -> Callable[[Path, Path | None], Export]:
    """Makes the export of `device_export` again in another folder, with other weights if a file is given."""
    return run_export


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree so that no build/ is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if Path(name).parts[0] not in ("tests", "docs", "benchmarks") and (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(folder / "tree")], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def device_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the base wheel and onnxruntime from the package index, and nothing else."""
    folder = tmp_path_factory.mktemp("device-env")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"vit-export[onnxruntime] @ {wheel.as_uri()}"], check=True, timeout=280)
    return python
