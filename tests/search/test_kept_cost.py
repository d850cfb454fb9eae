"""What layers kept within --max-drop cost is told in milliseconds, measured against a twin without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from contracts.small import small_vit
from vit_export.artifacts import EvalSet, LayerSensitivity, Precision, Preprocessing
from vit_export.build_size import Calibrated
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan as make_plan
from vit_export.errors import RunnerError
from vit_export.export.program import trace
from vit_export.kept_cost import KeptCost
from vit_export.runtime.latency import Timings
from vit_export.runtime.report_schema import Result
from vit_export.search.sensitivity import WITHIN, keeping

KEPT = ("blocks.0.mlp.fc1", "head")
RESULT = Result(target="onnx", precision=Precision.INT8, image_size=(32, 32), status="ok")


@pytest.fixture(scope="module")
def cost() -> KeptCost:
    """Two layers kept within the limit and one by the user, of a small ViT."""
    program = trace(small_vit())
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    ranges = calibrate(program, [images], MinMaxConfig())
    plan = keeping(make_plan(ranges, program.layers, keep_float=["patch_embed.*"]), KEPT, WITHIN)
    rows = (LayerSensitivity("head", "linear", 480, 21.5),)
    seen = EvalSet(Path("none"), Preprocessing((32, 32)), 4)
    return KeptCost(Calibrated(seen, ranges, replace(plan, sensitivity=rows), program))


def milliseconds(**medians: float) -> Timings:
    return Timings({name.replace("_", " "): (np.array([ms * 1e6] * 3),) for name, ms in medians.items()})


def test_the_difference_is_shared_out_by_products(cost: KeptCost) -> None:
    """Only what the limit kept is charged; the shares add up and go with the layers' products."""
    timings = milliseconds(onnx_int8_32x32=5.0, onnx_int8_32x32_all_int8=4.0)
    told = cost.told(RESULT, timings)
    layers = told.details["kept_float_cost"]["layers"]
    macs = {layer.name: layer.macs for layer in cost.known.program.layers}
    assert tuple(layers) == KEPT and sum(layers.values()) == pytest.approx(1.0)
    assert layers["head"] / layers[KEPT[0]] == pytest.approx(macs["head"] / macs[KEPT[0]])
    (note,) = told.notes
    assert "head (" in note and "21.5 dB if it alone were int8" in note
    assert "together +1.00 ms, measured: 5.00 ms with them, 4.00 ms in int8 throughout" in note


def test_without_a_time_nothing_is_claimed(cost: KeptCost) -> None:
    """An artifact that was not timed stays as it is; a twin that failed is said."""
    assert cost.told(RESULT, milliseconds()) == RESULT
    failed = Timings({}, {"onnx int8 32x32 all int8": RunnerError("it hung")})
    (note,) = cost.told(RESULT, failed).notes
    assert note.endswith("cost in time is not known: it hung")
