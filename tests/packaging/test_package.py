"""The wheel is the tree, imports go one way, and `--help` is quick."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("models", "calibration", "export", "runtime", "data")
APART = {"tests", "benchmarks", "examples", "docs", "build", ".ci"}


def _tree() -> set[str]:
    """Files of the package as git knows them (tracked or new), without what stands beside it."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {name for name in listed if Path(name).parts[0] not in APART and (ROOT / name).exists()}


def test_the_wheel_holds_the_tree_and_no_more(tmp_path: Path) -> None:
    """Every module and data file is in the wheel under vit_export/, and nothing else is."""
    source = tmp_path / "source"  # a copy: a build folder left in the tree would end up in the wheel
    for name in _tree():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    modules = {n for n in _tree() if n.endswith(".py") and not n.startswith("data/training/")}
    data = {n for n in _tree() if Path(n).suffix in (".safetensors", ".npz") or n == "py.typed"}
    data |= {n for n in _tree() if n.startswith("data/") and n.endswith(".json")}
    data |= {n for n in _tree() if n.endswith((".schema.json", "report.css"))}
    assert names == {f"vit_export/{name}" for name in modules | data}
    assert wheel.stat().st_size < 8_000_000


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vit_export"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("vit_export")}
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_each_other(stage: str) -> None:
    """A stage imports errors, artifacts, the embedded data and itself."""
    allowed = ("errors", "artifacts", "data", "python310", "__version__", stage)
    for path in (ROOT / stage).rglob("*.py"):
        if "training" in path.parts:
            continue
        for name in _imports(path):
            part = name.split(".")[1]
            assert part in allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("module", ["errors.py", "artifacts.py", "python310.py"])
def test_shared_modules_import_no_stage(module: str) -> None:
    """errors and artifacts stand below everything but what Python 3.10 lacks."""
    assert all(name.startswith("vit_export.python310.") for name in _imports(ROOT / module))


def test_nothing_imports_the_command_line() -> None:
    """cli is the top: only __main__ and its own files (cli_*.py) know it."""
    for name in _tree():
        if name.endswith(".py") and not name.startswith(("cli", "__main__")):
            assert not any(i.startswith("vit_export.cli") for i in _imports(ROOT / name)), name


def test_help_is_quick_and_loads_no_sdk() -> None:
    """`--help` imports neither torch nor numpy-heavy stages; the best of five is below 0.3 s of CPU."""
    code = (
        "import sys, time; t = time.process_time(); sys.argv = ['vit-export', '--help']\n"
        "from vit_export.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'timm', 'transformers', 'coremltools'}\n"
        "print(time.process_time() - t, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    times = []
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, _, heavy = run.stderr.strip().partition(" ")
        assert heavy == "[]" and "--target" in run.stdout
        times.append(float(seconds))
        time.sleep(0.05)
    assert min(times) < 0.3
