"""Does every TensorRT attribute our code touches exist in the TensorRT versions we promise?

No GPU and no TensorRT libraries are needed. NVIDIA publishes the Python bindings alone on PyPI
(tensorrt-cu12-bindings, tensorrt-cu13-bindings): one extension module that is linked against
libnvinfer and calls nothing while it is imported but a handful of C functions. This script downloads
the wheels, compiles a stub that answers those functions with 0, imports the real extension over the
stub in a process of its own, and lists its classes. What our code touches is read from our source by
`ast`: attributes of variables that hold SDK objects, which therefore have fixed names (HOLDERS).

An attribute behind `hasattr(...)` is optional and must exist in at least one product; every other one
must exist in all.

    python benchmarks/trt_api_conformance.py                                     # check, exit 1 on a miss
    python benchmarks/trt_api_conformance.py --record tests/trt/bindings.json   # and keep the names
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "export/trt_sdk.py",
    "export/trt_errors.py",
    "export/trt_build.py",
    "runtime/tensorrt_runner.py",
    "runtime/trt_session.py",
    "runtime/trt_inspector.py",
)
WHEELS = (
    "tensorrt-cu12-bindings==10.3.0",
    "tensorrt-cu12-bindings==10.16.1.11",
    "tensorrt-cu13-bindings==11.4.0.106",
)
MODULE = "<module>"

# Variable (or last part of an attribute, without leading underscores) → SDK class it holds.
HOLDERS: Mapping[str, str] = {
    "trt": MODULE,
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "refusal": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
# What a call returns where the result is used at once.
RETURNS: Mapping[tuple[str, str], str] = {
    ("INetworkDefinition", "get_input"): "ITensor",
    ("IBuilderConfig", "get_timing_cache"): "ITimingCache",
    ("ParserError", "code"): "ErrorCode",
}


@dataclass(frozen=True, slots=True, order=True)
class Touch:
    """One attribute used by our code. optional: only behind a `hasattr`."""

    owner: str
    name: str
    optional: bool
    where: str


def touched(sources: Iterable[Path]) -> tuple[Touch, ...]:
    """Every SDK attribute in `sources`, sorted, one entry a place."""
    return tuple(sorted({touch for path in sources for touch in _Reader(path).touches()}))


class _Reader(ast.NodeVisitor):
    """Collects attributes of SDK holders in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[Touch] = []
        self._guarded = False

    def touches(self) -> Iterator[Touch]:
        """The file's touches."""
        self.visit(ast.parse(self._path.read_text()))
        yield from self._found

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A function whose first lines leave when something is missing is guarded from there on."""
        before = self._guarded
        for statement in node.body:
            self.visit(statement)
            if isinstance(statement, ast.If) and _negated_guard(statement):
                self._guarded = True
        self._guarded = before

    def visit_If(self, node: ast.If) -> None:
        """The body of `if hasattr(...)` is guarded."""
        self.visit(node.test)
        before = self._guarded
        self._guarded = before or (_asks(node.test) and not _negated_guard(node))
        for statement in node.body:
            self.visit(statement)
        self._guarded = before
        for statement in node.orelse:
            self.visit(statement)

    def visit_Call(self, node: ast.Call) -> None:
        """`hasattr(config, "x")` and `getattr(context, "x", None)` touch x, optionally."""
        if isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            holder, name = node.args[:2]
            owner = self._owner(holder)
            if owner and isinstance(name, ast.Constant):
                self._add(owner, str(name.value), node.lineno, optional=True)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """`config.x`, `self._context.x`, `sdk.trt.BuilderFlag.x`."""
        owner = self._owner(node.value)
        if owner and not node.attr.startswith("__"):
            self._add(owner, node.attr, node.lineno, optional=self._guarded)
        self.generic_visit(node)

    def _add(self, owner: str, name: str, line: int, *, optional: bool) -> None:
        self._found.append(Touch(owner, name, optional, f"{self._path.name}:{line}"))

    def _owner(self, node: ast.expr) -> str | None:
        """The SDK class an expression holds: a holder, an SDK enum or class, or a known result."""
        if isinstance(node, ast.Name):
            return HOLDERS.get(node.id)
        if isinstance(node, ast.Attribute):
            if self._owner(node.value) == MODULE:
                return node.attr
            return HOLDERS.get(node.attr.lstrip("_")) if not self._owner(node.value) else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return RETURNS.get((self._owner(node.func.value) or "", node.func.attr))
        return None


def _asks(node: ast.AST) -> bool:
    calls = (n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    return any(call.func.id == "hasattr" for call in calls if isinstance(call.func, ast.Name))


def _negated_guard(node: ast.If) -> bool:
    """`if not hasattr(...): return ...`"""
    return (
        isinstance(node.test, ast.UnaryOp)
        and _asks(node.test)
        and isinstance(node.body[-1], ast.Return | ast.Raise)
    )


Names = Mapping[str, frozenset[str]]


def missing(touches: Iterable[Touch], products: Mapping[str, Names]) -> list[str]:
    """One line for each attribute that a product lacks (or, if optional, that all of them lack)."""
    lines = []
    for touch in touches:
        without = [
            product for product, names in products.items() if touch.name not in names.get(touch.owner, ())
        ]
        if (touch.optional and len(without) == len(products)) or (not touch.optional and without):
            lines.append(f"{touch.where}: {touch.owner}.{touch.name} is not in {', '.join(without)}")
    return lines


_DUMP = """
import importlib, json, sys
sdk = importlib.import_module(sys.argv[1])
names = {"<module>": [n for n in dir(sdk) if not n.startswith("__")]}
for owner in sys.argv[2].split(","):
    if hasattr(sdk, owner):
        names[owner] = [n for n in dir(getattr(sdk, owner)) if not n.startswith("__")]
print(json.dumps({"version": sdk.__version__, "names": names}))
"""


def list_names(module: str, owners: Iterable[str], environment: Mapping[str, str]) -> tuple[str, Names]:
    """(version, names by class) of an importable SDK module, read in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", _DUMP, module, ",".join(sorted(owners))]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"cannot import {module}:\n{done.stderr}")
    data = json.loads(done.stdout.splitlines()[-1])
    return data["version"], {owner: frozenset(names) for owner, names in data["names"].items()}


def bindings_names(requirement: str, owners: Iterable[str], work: Path) -> tuple[str, Names]:
    """The same for a bindings wheel from PyPI, over stub libraries."""
    wheels = work / re.sub(r"\W+", "_", requirement)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), requirement]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        archive.extractall(wheels)
    libraries = stub_libraries(wheels / "tensorrt_bindings" / "tensorrt.so", wheels / "stubs")
    environment = {**os.environ, "PYTHONPATH": str(wheels), "LD_LIBRARY_PATH": str(libraries)}
    return list_names("tensorrt_bindings", owners, environment)


def stub_libraries(extension: Path, folder: Path) -> Path:
    """Libraries under the names `extension` needs, in which its unversioned C functions return 0."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or shutil.which("nm") is None:
        raise SystemExit("needs a C compiler and nm (Debian: apt install gcc binutils)")
    folder.mkdir()
    # Symbols of the C library carry a version (@GLIBC_2.2.5), Python's start with Py: both are there.
    undefined = _output("nm", "-D", "--undefined-only", str(extension)).split()
    functions = sorted({s for s in undefined if re.fullmatch(r"(create|get|init)\w+", s)})
    needed = re.findall(r"\[(libnv\S+)\]", _output("readelf", "-d", str(extension)))
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
    stub = folder / needed[0]
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(stub), str(source)], check=True)
    for name in needed[1:]:
        (folder / name).symlink_to(stub.name)
    return folder


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Check all products; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, help="write the names of the classes we use to this file")
    record: Path | None = parser.parse_args().record
    touches = touched(ROOT / source for source in SOURCES)
    owners = {touch.owner for touch in touches} | {t.name for t in touches if t.owner == MODULE}
    owners -= {MODULE}
    products: dict[str, Names] = {}
    with tempfile.TemporaryDirectory() as work:
        for requirement in WHEELS:
            version, names = bindings_names(requirement, owners, Path(work))
            products[f"tensorrt {version}"] = names
    version, names = list_names("tensorrt_rtx", owners, os.environ)
    products[f"tensorrt_rtx {version}"] = names
    lines = missing(touches, products)
    attributes = {(touch.owner, touch.name) for touch in touches}
    print(f"{len(attributes)} attributes of {len(owners) + 1} owners, in {', '.join(products)}")
    for product, names in products.items():
        have = sum(name in names.get(owner, ()) for owner, name in attributes)
        print(f"  {product:28} has {have}")
    print("\n".join(lines) or "nothing is missing")
    if record is not None:
        listed = {p: {o: sorted(n) for o, n in names.items()} for p, names in products.items()}
        record.write_text(json.dumps(listed, indent=0, sort_keys=True) + "\n")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
