"""Our use of the SDK against the names in NVIDIA's own bindings.

bindings.json is written by `python benchmarks/trt_api_conformance.py --record tests/trt/bindings.json`
from the bindings wheels of TensorRT 10.3, 10.16 and 11.4 and from tensorrt_rtx 1.7.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE.parent.parent / "benchmarks" / "trt_api_conformance.py"


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trt_api_conformance", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def products() -> dict[str, dict[str, frozenset[str]]]:
    listed = json.loads((HERE / "bindings.json").read_text())
    return {
        p: {owner: frozenset(names) for owner, names in by_owner.items()} for p, by_owner in listed.items()
    }


def test_every_attribute_exists_in_every_promised_version(checker, products):
    """What our source touches is in TensorRT 10.3, 10.16, 11.4 and RTX; what is not is behind hasattr."""
    touches = checker.touched(checker.ROOT / source for source in checker.SOURCES)
    assert [p.partition(" ")[2].rpartition(".")[0] for p in products] == [
        "10.16.1",
        "10.3",
        "11.4.0",
        "1.7.1",
    ]
    assert len({(t.owner, t.name) for t in touches}) > 70
    assert checker.missing(touches, products) == []


def test_a_removed_attribute_would_be_noticed(checker, products, tmp_path):
    """FP16 builder flags, gone in 11, and a misspelt method are reported with file and line."""
    source = tmp_path / "old.py"
    source.write_text(
        "def f(trt, config):\n    config.set_flag(trt.BuilderFlag.FP16)\n    config.set_flagg(1)\n"
    )
    lines = checker.missing(checker.touched([source]), products)
    assert len(lines) == 2
    assert any(line.startswith("old.py:2: BuilderFlag.FP16 is not in") and "11.4" in line for line in lines)
    assert any("IBuilderConfig.set_flagg" in line and "10.3.0" in line for line in lines)


def test_hasattr_makes_optional_but_not_imaginary(checker, products, tmp_path):
    """Behind hasattr an attribute may be missing from some products, not from all."""
    source = tmp_path / "guarded.py"
    source.write_text(
        "def f(config):\n"
        "    if not hasattr(config, 'set_compute_capability'):\n"
        "        return\n"
        "    config.set_compute_capability(1, 0)\n"
        "def g(config):\n"
        "    if hasattr(config, 'never_was'):\n"
        "        config.never_was()\n"
    )
    lines = checker.missing(checker.touched([source]), products)
    assert lines and all("never_was" in line for line in lines)


def test_no_sdk_object_hides_under_another_name(checker):
    """Results of SDK calls whose attributes are used are held under a name the checker knows."""
    for source in checker.SOURCES:
        tree = ast.parse((checker.ROOT / source).read_text())
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            made = {
                target.id
                for statement in ast.walk(function)
                if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
                for target in statement.targets
                if isinstance(target, ast.Name) and _called_on_sdk(checker, statement.value)
            }
            used = {
                n.value.id
                for n in ast.walk(function)
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
            }
            assert made & used <= set(checker.HOLDERS), f"{source}: {function.name}"


def _called_on_sdk(checker, call: ast.Call) -> bool:
    value = call.func
    while isinstance(value, ast.Attribute):
        value = value.value
        name = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")
        if name.lstrip("_") in checker.HOLDERS:
            return True
    return False


def test_the_fake_sdk_invents_nothing(fake_gpu, products):
    """Every public name of the fake TensorRT is in the real 10.3 bindings, so tests prove no fiction."""
    import tensorrt as fake

    real = products["tensorrt 10.3.0"]
    for name, kind in inspect.getmembers(fake, inspect.isclass):
        if kind.__module__ != fake.__name__:
            continue
        assert name in real["<module>"]
        public = {member for member in vars(kind) if not member.startswith("_")} - {"severity", "logger"}
        assert public <= real[name] | {"NONE"}, name


def test_the_fake_cuda_invents_nothing(fake_gpu):
    """Every CUDA function of the fake is in the installed cuda-bindings."""
    import subprocess
    import sys

    names = [n for n, f in inspect.getmembers(fake_gpu, inspect.isfunction) if n.startswith("cuda")]
    code = f"import cuda.bindings.runtime as r; print([n for n in {names!r} if not hasattr(r, n)])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin"}
    )
    assert done.stdout.strip() == "[]"
