"""Small mutation fuzzing of everything that reads a file from elsewhere: seeds, mutations, readers.

`READERS` is the table: a name, the honest files it starts from, how they are changed, and what reads them.
A reader may succeed or raise one of our errors (exit code 2 or 3); anything else is a finding. Used by
tests/security, and for longer by benchmarks/fuzz.py.
"""

from __future__ import annotations

import copy
import io
import json
import random
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contracts.bundles import fake_bundle
from contracts.sample_report import report, result
from vit_export.errors import VitExportError

LIMIT_SECONDS = 20  # of one file
Mutation = Callable[[random.Random, bytes], bytes]


class Hang(BaseException):
    """A reader took longer than LIMIT_SECONDS. No Exception: nothing in between may catch it."""


@dataclass(frozen=True)
class Reader:
    """seeds: makes honest files in a folder. mutate: changes one. read: what the product does with it."""

    suffix: str
    seeds: Callable[[Path], Sequence[bytes]]
    mutate: Mutation
    read: Callable[[Path], object]


def outcome(reader: Reader, path: Path) -> str:
    """`read`, or the class of our error. Any other exception leaves this function: a finding."""
    with deadline():
        try:
            reader.read(path)
            return "read"
        except VitExportError as error:
            assert error.exit_code in (2, 3), f"exit code {error.exit_code}: {error}"
            assert len(str(error)) < 4000, "an error as long as the file"
            return type(error).__name__


@contextmanager
def deadline(seconds: int = LIMIT_SECONDS) -> Iterator[None]:
    """Raise Hang in the main thread when the block takes longer."""

    def late(*_: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# What a byte, an integer or a value is replaced by.
_BYTES = (0, 1, 0x7F, 0x80, 0xFF, 0x2F, 0x2E, 0x22, 0x5B, 0x7B)
_WORDS = (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1 << 31, 1 << 63, 1 << 70, -(1 << 70), 1e308, -1e-320, "", "../../x", "/etc",
    "\x00", "\u202e", "a" * 3000, "-oProxyCommand=x", [], {}, [[]], {"": {}}, [None] * 50, "1e999", "NaN",
)  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few random changes of bytes, words and slices, or a cut."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0 if place < len(out):
                out[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(out):
                out[place] = rng.choice(_BYTES)
            case 2:
                size, form = rng.choice(((2, "<H"), (4, "<I"), (4, ">I")))
                out[place : place + size] = struct.pack(form, rng.choice(_WORDS) & ((1 << 8 * size) - 1))
            case 3:
                del out[place : place + rng.choice((1, 4, 32, 500))]
            case 4:
                out[place:place] = out[place : place + rng.choice((1, 4, 32, 500))]
            case 5:
                out[place:place] = rng.randbytes(rng.choice((1, 4, 32)))
            case _:
                del out[place : len(out) if rng.random() < 0.3 else place + 1]
    return bytes(out)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Another value, a missing or an additional key somewhere; sometimes plain bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        holder = value
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.85:
                holder = holder[key]
                continue
            _change(rng, holder, key)
            break
    return json.dumps(value).encode()


def _change(rng: random.Random, holder: Any, key: Any) -> None:
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("", "x", "__class__", "../x"))] = holder[key]
        case 2 if isinstance(holder, list):
            holder.extend([holder[key]] * rng.choice((1, 100)))
        case _:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Lines and words of a text file swapped, repeated or replaced; sometimes plain bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    lines = data.decode().splitlines()
    for _ in range(rng.choice((1, 2, 3))):
        row = rng.randrange(len(lines))
        name, _, _ = lines[row].partition("=")
        match rng.randrange(4):
            case 0:
                lines[row] = f"{name}= {json.dumps(rng.choice(_VALUES))}"
            case 1:
                value = rng.choice(("inf", "nan", "1979-05-27", "[[1]]", "{a=1}", "0x" + "f" * 99))
                lines[row] = f"{name}= {value}"
            case 2:
                lines.insert(row, lines[rng.randrange(len(lines))])
            case _:
                lines[row] = "[" * rng.choice((1, 2, 2000)) + lines[row]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_zip(rng: random.Random, data: bytes) -> bytes:
    """The bytes of the archive or, more often, the bytes of one of its members, packed again."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen, how = rng.choice(names), rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        for name in names:
            content = old.read(name)
            if name == chosen:
                inner = mutate_json if name.endswith(".json") and rng.random() < 0.8 else mutate_bytes
                content = inner(rng, content)
            new.writestr(name, content, how if name == chosen else zipfile.ZIP_STORED)
    return out.getvalue()


# Honest files, as small as they can be.
def _manifests(folder: Path) -> list[bytes]:
    return [(fake_bundle(folder / "out") / "manifest.json").read_bytes()]


def _bundles(folder: Path) -> list[bytes]:
    return [fake_bundle(folder / "out", images=16, zipped=True, size=100).read_bytes()]


def _reports(folder: Path) -> list[bytes]:
    from vit_export.runtime.report_schema import encode

    return [encode(report(result(), result(status="failed", reason="x")))]


def _plans(folder: Path) -> list[bytes]:
    layers = [{"name": f"b.{i}", "quantized": True, "input": {"low": -1.0, "high": 2.0}} for i in range(3)]
    return [json.dumps({"method": "minmax", "seed": 0, "images": 8, "layers": layers}).encode()]


def _rules(folder: Path) -> list[bytes]:
    return [(Path(__file__).parents[2] / "examples/ci/gate.toml").read_bytes()]


def _configs(folder: Path) -> list[bytes]:
    text = """target = ["nope"]
int8 = true
image-size = ["96", "128x96"]
calib-size = 16
mean = "0.5,0.5,0.5"
max-drop = 1.5
keep-float = ["head"]
output = "out"
seed = 3
calib = "photos"
timeout = 5
quiet = true
"""
    return [text.encode()]


def _npz(folder: Path) -> list[bytes]:
    rng, made = np.random.default_rng(0), []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, images=rng.integers(0, 9, (4, 6, 5, 3), dtype=np.uint8), labels=np.arange(4))
        made.append(file.getvalue())
    return made


def _images(folder: Path) -> list[bytes]:
    rng, made = np.random.default_rng(0), []
    image = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for name, mode in (
        ("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("BMP", "RGB"),
        ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("PPM", "RGB"), ("JPEG2000", "RGB"),
        ("AVIF", "RGB"),
    ):  # fmt: skip
        file = io.BytesIO()
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(file, name)
        made.append(file.getvalue())
    return made


def _onnx(folder: Path) -> list[bytes]:
    """A convolution, a linear and the shape arithmetic around them."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((4, 3, 4, 4)).astype(np.float32),
        "h": rng.standard_normal((4, 5)).astype(np.float32),
        "b": np.zeros(5, np.float32), "two": np.array([2], np.int64), "shape": np.array([0, 4, -1], np.int64),
        "one": np.array([1, 1, 4], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[4, 4]),
        helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("ConstantOfShape", ["one"], ["p"]),
        helper.make_node("Add", ["t", "p"], ["q"]),
        helper.make_node("ReduceMean", ["q", "two"], ["unused"], keepdims=0),
        helper.make_node("MatMul", ["q", "h"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Gelu", ["a"], ["g"]),
        helper.make_node("ReduceMean", ["g", "axis"], ["y"], keepdims=0),
    ]
    constants["axis"] = np.array([1], np.int64)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 20)]
    return [helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()]


def _programs(folder: Path) -> list[bytes]:
    import torch
    from torch import nn

    folder.mkdir(parents=True, exist_ok=True)
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 5)).eval()
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch)
    torch.export.save(program, folder / "p.pt2")
    return [(folder / "p.pt2").read_bytes()]


def _checkpoints(folder: Path) -> list[bytes]:
    import torch
    from safetensors.torch import save

    state = {"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3)}
    file = io.BytesIO()
    torch.save({"state_dict": state}, file)
    return [file.getvalue(), save(state)]


# What the product does with each.
def _read_manifest(path: Path) -> object:
    from vit_export.runtime.bundle_manifest import decode

    return decode(path.read_bytes(), "test")


def _read_bundle(path: Path) -> object:
    import tempfile

    from vit_export.runtime.bundle_open import open_bundle

    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        bundle = open_bundle(path, Path(work))
        for size in bundle.manifest.sizes:
            for stored in (size.golden, size.evaluation):
                bundle.images(stored, size.preprocessing)
                bundle.logits(stored)
        return bundle


def _read_report(path: Path) -> object:
    from vit_export.runtime import report_files
    from vit_export.runtime.gate import gate

    found = report_files.read(path)
    for name in report_files.WRITERS:
        report_files.render(found, name)
    return gate(found, found)


def _read_plan(path: Path) -> object:
    from vit_export.calibration.plan import read

    return read(path)


def _read_rules(path: Path) -> object:
    from vit_export.runtime.gate_rules import read_rules

    return read_rules(path)


def _read_config(path: Path) -> object:
    """The whole command line; its target does not exist, so it ends before any work, with exit code 2."""
    from vit_export import cli

    before = sys.argv
    sys.argv = ["vit-export", "--config", str(path), "--target", "nope"]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == 2, f"exit code {stop.code}"
    finally:
        sys.argv = before
    return None


def _read_images(path: Path) -> object:
    from vit_export.calibration.images import open_images

    return [getattr(image, "size", "bad") for image in open_images(path).images()]


def _read_image(path: Path) -> object:
    from vit_export.artifacts import Preprocessing
    from vit_export.calibration.images import BadImage, decode
    from vit_export.calibration.preprocess import to_pixels

    try:
        with path.open("rb") as file:
            return to_pixels(decode(file), Preprocessing((8, 8)))
    except BadImage as bad:
        return bad


def _load(path: Path) -> object:
    from vit_export.models import load

    return load(str(path))


def _read_checkpoint(path: Path) -> object:
    from vit_export.models.checkpoint import read_state

    safe = path.is_file() and path.read_bytes()[8:9] == b"{"
    named = path.with_suffix(".safetensors") if safe else path
    if named != path:
        path.rename(named)
    return read_state(named)


READERS: Mapping[str, Reader] = {
    "manifest": Reader(".json", _manifests, mutate_json, _read_manifest),
    "bundle": Reader(".zip", _bundles, mutate_zip, _read_bundle),
    "report": Reader(".json", _reports, mutate_json, _read_report),
    "plan": Reader(".json", _plans, mutate_json, _read_plan),
    "rules": Reader(".toml", _rules, mutate_text, _read_rules),
    "config": Reader(".toml", _configs, mutate_text, _read_config),
    "npz": Reader(".npz", _npz, mutate_zip, _read_images),
    "image": Reader(".png", _images, mutate_bytes, _read_image),
    "checkpoint": Reader(".pt", _checkpoints, mutate_bytes, _read_checkpoint),
    "onnx": Reader(".onnx", _onnx, mutate_bytes, _load),
    "program": Reader(".pt2", _programs, mutate_zip, _load),
}
