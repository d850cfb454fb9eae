"""Saved programs (.pt2): loaded with their names, refused when they hold more than tensors."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from contracts.families import FAMILIES, UserVit, images
from vit_export.errors import BadSize, InputError, UntrustedInput
from vit_export.models import LoadOptions, adapt, load


def saved(module: nn.Module, path: Path, *inputs: Tensor, dynamic: bool = True) -> str:
    shapes = ({0: Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=shapes), path)
    return str(path)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "user.pt2"
    torch.manual_seed(0)
    saved(UserVit(), path, images((32, 32)))
    return path


def test_a_program_keeps_its_names_and_numbers(program: Path) -> None:
    """Parameters keep their names, the logits are found, any batch runs, it can be exported again."""
    torch.manual_seed(0)
    theirs = UserVit().eval()
    model = load(str(program))
    assert (model.image_size, model.output, model.num_classes) == (
        (32, 32),
        "logits (also returned: features)",
        5,
    )
    assert {n for n, _ in model.module.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    batch = images((32, 32), batch=3, seed=1)
    with torch.no_grad():
        reference = theirs(batch)["logits"]
        assert torch.allclose(model.module(batch), reference, atol=1e-6)
        again = torch.export.export(model.module, (images((32, 32)),), dynamic_shapes=({0: Dim("b")},))
        assert torch.allclose(again.module()(batch), reference, atol=1e-6)


def test_a_program_has_one_size(program: Path) -> None:
    """Positions are constants of the program: another size is refused with the one there is."""
    with pytest.raises(BadSize, match="exported for 32x32 and has no other size; nearest: 32x32"):
        adapt(load(str(program)), (64, 64))
    with pytest.raises(InputError, match="brings its own weights"):
        load(str(program), LoadOptions(num_classes=3))


def test_a_fixed_batch_is_said(tmp_path: Path) -> None:
    """A program traced for one batch size runs with it and says so."""
    model = load(saved(UserVit(), tmp_path / "three.pt2", images((32, 32), batch=3), dynamic=False))
    assert "the program takes batches of 3 only" in model.notes


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.mean((2, 3)) + y


class Droops(nn.Module):
    """Always drops: what a model exported in training mode does."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.mean((2, 3)), 0.5, training=True)


def test_programs_that_take_no_image_are_refused(tmp_path: Path) -> None:
    """Two inputs or a flat one: the error says what the program takes."""
    torch.export.save(torch.export.export(Two(), (images((8, 8)), torch.zeros(2, 3))), tmp_path / "two.pt2")
    with pytest.raises(InputError, match=r"must take one float32 .* it takes \[2, 3, 8, 8\], \[2, 3\]"):
        load(str(tmp_path / "two.pt2"))


def test_a_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    """Dropout that drops is an error with the fix, not a noisy result."""
    with pytest.raises(InputError, match=r"exported in training mode \(dropout\)") as caught:
        load(saved(Droops(), tmp_path / "train.pt2", images((8, 8))))
    assert caught.value.hint == "call model.eval() before"


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def repacked(source: Path, target: Path, change: dict[str, Any]) -> str:
    """The archive with some members replaced, by the end of their name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            made = next((make for end, make in change.items() if name.endswith(end)), None)
            new.writestr(name, made(old.read(name)) if made else old.read(name))
        for end, make in change.items():
            if end.startswith("+"):
                new.writestr(old.namelist()[0].split("/")[0] + end[1:], make(b""))
    return str(target)


def _with_pickle(content: bytes) -> bytes:
    config = json.loads(content)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


def test_programs_with_pickles_are_refused_without_running_them(program: Path, tmp_path: Path) -> None:
    """Example inputs, weights or constants that are Python objects: refused, and nothing has run."""
    trace = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Payload(trace), buffer)
    evil: list[dict[str, Any]] = [
        {"sample_inputs/model.pt": lambda _: buffer.getvalue()},
        {"sample_inputs/model.pt": lambda _: pickle.dumps(Payload(trace))},
        {"model_weights_config.json": _with_pickle},
        {"+/data/constants/opaque_obj_0": lambda _: pickle.dumps(Payload(trace))},
    ]
    for number, change in enumerate(evil):
        with pytest.raises(UntrustedInput, match="holds pickled objects"):
            load(repacked(program, tmp_path / f"{number}.pt2", change))
    assert not trace.exists()


def _replaced(old: str, new: str) -> Any:
    """Change of a JSON member that puts a text in the place of another, wherever it is."""
    quoted = json.dumps(new)[1:-1].encode()

    def change(content: bytes) -> bytes:
        assert json.dumps(old)[1:-1].encode() in content
        return content.replace(json.dumps(old)[1:-1].encode(), quoted)

    return {"models/model.json": change}


def _import_spec(trace: Path) -> Any:
    """A tree spec whose context imports a module that would create `trace`."""

    def change(content: bytes) -> bytes:
        model = json.loads(content)
        entry = next(e for e in model["graph_module"]["module_call_graph"] if e["signature"])
        context = json.dumps({"__enum__": True, "fqn": "evil_module:X", "name": "Y"})
        spec = [1, {"type": "builtins.dict", "context": context, "children_spec": []}]
        entry["signature"]["in_spec"] = json.dumps(spec)
        return json.dumps(model).encode()

    return {"models/model.json": change}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_code_in_other_places_is_refused_without_running_it(program: Path, tmp_path: Path) -> None:
    """Operators, expressions, tree specs, libraries, names and huge shapes: refused, and nothing has run.

    torch.export.load itself evaluates the second, imports the third, loads the fourth, and would run
    the first when the module runs.
    """
    trace = tmp_path / "ran"
    touch = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    first = json.loads(_member(program, "models/model.json"))["graph_module"]["graph"]["nodes"][0]["target"]
    weights = json.loads(_member(program, "model_weights_config.json"))["config"]
    name = next(iter(weights))
    evil: list[tuple[dict[str, Any], str]] = [
        (_replaced(first, "torch.os.system"), "calls torch.os.system"),
        (_replaced(first, "torch.ops.aten.from_file.default"), "calls torch.ops.aten.from_file"),
        (_replaced(first, "torch.ops.aten.__init__"), "calls torch.ops"),
        (_replaced("Symbol('", touch + "+Symbol('"), "no arithmetic"),
        (_replaced("Symbol('", "Pow(Integer(9), Integer(9999999999))+Symbol('"), "no arithmetic"),
        (_import_spec(trace), "imports modules"),
        ({"+/data/aotinductor/model/model.so": lambda _: b"ELF"}, "compiled code"),
        (_replaced(name, f"a\"), {touch}, (\""), "a name that is none"),
        (_huge(name), "more than its file holds"),
        ({"+/models/model.json": lambda _: b"{}"}, "twice"),
    ]  # fmt: skip
    for number, (change, words) in enumerate(evil):
        with pytest.raises(UntrustedInput, match=re.escape(words)):
            load(repacked(program, tmp_path / f"{number}.pt2", change))
    assert not trace.exists()


def _member(program: Path, end: str) -> bytes:
    with zipfile.ZipFile(program) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(end)))


def _huge(name: str) -> dict[str, Any]:
    """A weight that claims 2^40 elements."""

    def change(content: bytes) -> bytes:
        config = json.loads(content)
        config["config"][name]["tensor_meta"]["sizes"] = [{"as_int": 1 << 20}, {"as_int": 1 << 20}]
        return json.dumps(config).encode()

    return {"model_weights_config.json": change}


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + b"\x00" * 18])
def test_a_broken_program_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    """Empty files, other files and empty archives."""
    path = tmp_path / "bad.pt2"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is no program of torch\.export\.save") as caught:
        load(str(path))
    assert "\n" not in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_a_program(family: str, tmp_path: Path) -> None:
    """Each family saved as a program and loaded again gives its own numbers."""
    model = FAMILIES[family].load()
    again = load(saved(model.module, tmp_path / "m.pt2", images(model.image_size)))
    batch = images(model.image_size, batch=3)
    with torch.no_grad():
        assert torch.allclose(again.module(batch), model.module(batch), atol=1e-5)
