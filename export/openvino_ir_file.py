"""From an ONNX file to an OpenVINO IR. Imports neither torch nor onnx: it runs in a child process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vit_export.errors import TargetError


def write_ir(source: Path, target: Path, metadata: Mapping[str, str], half: bool) -> str:
    """Write `target` (.xml, with a .bin beside it) and give OpenVINO's version.

    half: store weights in float16. Raises TargetError when OpenVINO refuses the graph.
    """
    import openvino

    try:
        model = openvino.Core().read_model(str(source))
    except RuntimeError as error:
        raise TargetError(f"OpenVINO refused the graph: {str(error).strip().splitlines()[-1]}") from error
    for key, value in metadata.items():
        model.set_rt_info(value, ["vit_export", key])
    model.inputs[0].get_node().set_layout(openvino.Layout("NCHW"))
    openvino.save_model(model, str(target), compress_to_fp16=half)
    return str(openvino.get_version())
