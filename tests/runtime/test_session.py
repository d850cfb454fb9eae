"""Session options in an artifact's own metadata: how they are read and that runners use them."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.tiny import Tiny, images
from vit_export.artifacts import Runnable
from vit_export.errors import InputError, UsageError
from vit_export.runtime.onnx_metadata import metadata
from vit_export.runtime.ort_runner import cpu_entries
from vit_export.runtime.runner import open_runner


def test_a_processor_without_vnni_gets_exact_kernels() -> None:
    """ONNX Runtime's u8 x s8 kernels saturate on AVX2 without VNNI, so such a processor asks for others."""
    assert cpu_entries(("avx2", "avx512")) == ("session.x64quantprecision",)
    assert cpu_entries(("avx2", "avx512", "vnni")) == () and cpu_entries(("neon", "dotprod")) == ()


def with_session(path: Path, copy: Path, session: str) -> Path:
    """A copy of an .onnx file that names session options."""
    model = onnx.load(str(path))
    for name, value in (("producer", "vit-export"), ("session", session)):
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value
    onnx.save(model, str(copy))
    return copy


def test_metadata_is_what_onnx_reads(tiny: Tiny, tmp_path: Path) -> None:
    """Our reader finds the same entries as the onnx package."""
    path = with_session(tiny.path("onnx"), tmp_path / "model.onnx", '{"spinning":false}')
    expected = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert metadata(path) == expected and expected["session"] == '{"spinning":false}'


def test_onnx_runtime_opens_as_the_file_says(tiny: Tiny, tmp_path: Path) -> None:
    """The file's options hold where the runnable sets none; the runnable's own win."""
    path = with_session(tiny.path("onnx"), tmp_path / "model.onnx", '{"spinning":false}')
    for given_options, spinning in (({}, False), ({"spinning": True}, True)):
        with open_runner(Runnable("onnx", path, 1, given_options)) as runner:
            assert runner._choice.spinning is spinning
            assert runner.infer(images(1)).shape == (1, 7)


def test_openvino_opens_as_the_file_says(tiny: Tiny, tmp_path: Path) -> None:
    """The same for an IR, whose rt_info carries them."""
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().read_model(str(tiny.path("xml")))
    model.set_rt_info('{"hint":"THROUGHPUT"}', ["vit_export", "session"])
    openvino.save_model(model, str(tmp_path / "model.xml"), compress_to_fp16=False)
    with open_runner(Runnable("openvino", tmp_path / "model.xml", 2)) as runner:
        assert runner._choice.hint == "THROUGHPUT" and runner.infer(images(2)).shape == (2, 7)


@pytest.mark.parametrize(
    ("session", "error"), [("{", InputError), ("[1]", InputError), ('{"colour":1}', UsageError)]
)
def test_a_session_that_is_none_is_refused(session: str, error: type, tiny: Tiny, tmp_path: Path) -> None:
    """Text that is no JSON object, or names an unknown option, is an error and not ignored."""
    path = with_session(tiny.path("onnx"), tmp_path / "model.onnx", session)
    with pytest.raises(error), open_runner(Runnable("onnx", path, 1)):
        pass


@given(data=st.binary(max_size=300), cut=st.integers(0, 400))
def test_any_bytes_end(data: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the bytes, the reader ends without an error: the runtime says what is wrong with the file."""
    path = tmp_path_factory.mktemp("bytes") / "model.onnx"
    path.write_bytes(data)
    assert isinstance(metadata(path), dict)
    entry = b"\x72\x0a\x0a\x03key\x12\x03abc"
    path.write_bytes(entry + data[:cut])
    assert metadata(path)["key"]
    shutil.rmtree(path.parent)
