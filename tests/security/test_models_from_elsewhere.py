"""Model files that would run code, read other files or fill the memory are refused, and nothing happens."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from contracts.fuzzing import READERS, deadline
from vit_export.errors import InputError, UntrustedInput, VitExportError
from vit_export.models import load


def graph(
    *nodes: onnx.NodeProto, constants: dict[str, Any] | None = None, size: Any = (8, 8)
) -> onnx.ModelProto:
    """A model with one image input and the output y."""
    made = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in (constants or {}).items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def refused(model: onnx.ModelProto, folder: Path) -> VitExportError:
    """The error that loading it gives, within the time a file may take."""
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with deadline(), pytest.raises(VitExportError) as caught:
        load(str(folder / "model.onnx"))
    assert caught.value.exit_code in (2, 3)
    return caught.value


BOMBS: dict[str, tuple[onnx.NodeProto, dict[str, Any]]] = {
    "fill": (helper.make_node("ConstantOfShape", ["s"], ["y"]), {"s": [1 << 20, 1 << 20]}),
    "expand": (helper.make_node("Expand", ["x", "s"], ["y"]), {"s": [1 << 30, 3, 8, 8]}),
    "tile": (helper.make_node("Tile", ["x", "s"], ["y"]), {"s": [1 << 15, 1 << 15, 1 << 15, 1]}),
    "pad": (helper.make_node("Pad", ["x", "s"], ["y"]), {"s": [0, 0, 1 << 20, 1 << 20, 0, 0, 0, 0]}),
    "range": (
        helper.make_node("Range", ["a", "b", "c"], ["y"]),
        {"a": np.array(0), "b": np.array(1 << 50), "c": np.array(1)},
    ),
    "steps": (
        helper.make_node("Range", ["a", "b", "c"], ["y"]),
        {"a": np.array(0), "b": np.array(9), "c": np.array(0)},
    ),
    "resize": (
        helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode="linear"),
        {"s": [1, 3, 1 << 24, 1 << 24]},
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_cannot_ask_for_any_amount_of_memory(name: str, tmp_path: Path) -> None:
    """Shapes that a node makes up are bounded before anything is allocated."""
    node, constants = BOMBS[name]
    assert "cannot be imported" in str(refused(graph(node, constants=constants), tmp_path))


def test_an_image_of_any_size_is_refused(tmp_path: Path) -> None:
    """A declared input of a million pixels a side is not filled with noise."""
    model = graph(helper.make_node("Identity", ["x"], ["y"]), size=(1 << 20, 1 << 20))
    assert isinstance(refused(model, tmp_path), UntrustedInput)


def test_a_tensor_that_lies_about_its_size(tmp_path: Path) -> None:
    """A shape of terabytes over eight bytes of data."""
    model = graph(helper.make_node("Add", ["x", "w"], ["y"]), constants={"w": np.ones(2, np.float32)})
    model.graph.initializer[0].dims[:] = [1 << 40]
    assert isinstance(refused(model, tmp_path), InputError)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/../../secret", "link"])
def test_external_data_stays_in_its_folder(location: str, tmp_path: Path) -> None:
    """Weights outside the model's folder, named or linked, are not read."""
    (tmp_path / "secret").write_bytes(b"\0" * 8)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    model = graph(helper.make_node("Add", ["x", "w"], ["y"]), constants={"w": np.ones(2, np.float32)})
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    assert isinstance(refused(model, folder), InputError)


def test_functions_that_call_themselves(tmp_path: Path) -> None:
    """A local function without an end is refused, not unrolled."""
    call = helper.make_node("F", ["x"], ["y"], domain="d")
    model = graph(call)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("d", 1)]
    model.opset_import.append(opsets[1])
    model.functions.append(helper.make_function("d", "F", ["x"], ["y"], [call], opsets))
    refused(model, tmp_path)


def test_nesting_without_an_end(tmp_path: Path) -> None:
    """Subgraphs in subgraphs, deeper than a stack."""
    inner = graph(helper.make_node("Identity", ["x"], ["y"])).graph
    for _ in range(40):
        node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph(
            [node], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])]
        )
        if inner.ByteSize() > 1 << 18:
            break
    model = graph()
    model.graph.node.extend(inner.node)
    refused(model, tmp_path)


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_checkpoint_from_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vit-export --checkpoint evil.pt`: exit code 2, one line, no file, no output folder."""
    import sys

    from vit_export import cli

    trace = tmp_path / "ran"
    for number, content in enumerate((pickle.dumps(Payload(trace)), _zip_checkpoint(trace, tmp_path))):
        evil = tmp_path / f"evil{number}.pt"
        evil.write_bytes(content)
        argv = ["vit-export", "--checkpoint", str(evil), "-o", str(tmp_path / "out"), "-q"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        err = capfd.readouterr().err
        assert stop.value.code == 2 and "would have to be executed" in err and "Traceback" not in err
    assert not trace.exists() and not (tmp_path / "out").exists()


def _zip_checkpoint(trace: Path, folder: Path) -> bytes:
    """As torch.save writes it, with the payload as its pickle."""
    with zipfile.ZipFile(folder / "seed.zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(trace), protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return (folder / "seed.zip").read_bytes()


def test_an_npz_of_pickles_is_refused(tmp_path: Path) -> None:
    """Object arrays are pickles: neither images nor labels of them are read."""
    trace = tmp_path / "ran"
    evil = np.array([Payload(trace)], dtype=object)
    good = np.zeros((1, 4, 4, 3), np.uint8)
    for arrays in ({"images": evil}, {"images": good, "labels": evil}):
        np.savez(tmp_path / "x.npz", **arrays, allow_pickle=True)
        with pytest.raises(InputError):
            READERS["npz"].read(tmp_path / "x.npz")
    assert not trace.exists()
