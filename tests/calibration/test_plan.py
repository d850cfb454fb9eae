"""Plans: what is kept float, what is said about wrong patterns, and plan.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_export.artifacts import Layer, LayerPlan, QuantPlan, Range, Ranges
from vit_export.calibration.plan import plan, read, save
from vit_export.errors import InputError, UsageError

NAMES = ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.10.mlp.fc1", "head")
LAYERS = [Layer(name, "linear", name, f"{name}.weight", None, (4, 4), 16) for name in NAMES]
RANGES = Ranges("mse", 64, {name: Range(-1.0 - index, 2.5) for index, name in enumerate(NAMES)})


def test_everything_is_quantised_by_default() -> None:
    """Every layer in order, with its own range, and the method, seed and image count of the run."""
    made = plan(RANGES, LAYERS, seed=5)
    assert [layer.name for layer in made.layers] == list(NAMES) and made.kept_float() == ()
    assert all(layer.quantized and layer.input == RANGES.inputs[layer.name] for layer in made.layers)
    assert (made.method, made.seed, made.images) == ("mse", 5, 64)


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("head", ("head",)),
        ("*.fc1", ("blocks.0.mlp.fc1", "blocks.10.mlp.fc1")),
        ("blocks.0.*", ("blocks.0.attn.qkv", "blocks.0.mlp.fc1")),
        ("blocks.?.mlp.*", ("blocks.0.mlp.fc1",)),
        ("*", NAMES),
    ],
)
def test_patterns_keep_layers_float(pattern: str, kept: tuple[str, ...]) -> None:
    """Shell patterns over whole names; the reason is the pattern."""
    made = plan(RANGES, LAYERS, keep_float=[pattern])
    assert made.kept_float() == kept
    assert {layer.reason for layer in made.layers if not layer.quantized} == {f"--keep-float {pattern}"}


def test_a_pattern_without_a_match_names_close_layers() -> None:
    """A typo is a usage error that shows the names it was close to; case matters."""
    with pytest.raises(UsageError, match=r"--keep-float block.0.attn.qvk .*\n.*blocks\.0\.attn\.qkv"):
        plan(RANGES, LAYERS, keep_float=["head", "block.0.attn.qvk"])
    with pytest.raises(UsageError, match="HEAD"):
        plan(RANGES, LAYERS, keep_float=["HEAD"])


def test_ranges_of_another_model_are_refused() -> None:
    """A layer that was not calibrated is named."""
    with pytest.raises(InputError, match=r"no range for head"):
        plan(replace(RANGES, inputs={name: Range(0, 1) for name in NAMES[:-1]}), LAYERS)


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
LAYER_PLANS = st.builds(
    LayerPlan,
    name=st.text(min_size=1),
    quantized=st.booleans(),
    input=st.tuples(NUMBERS, NUMBERS).map(lambda ends: Range(min(ends), max(ends))),
    weight_bits=st.sampled_from([4, 8]),
    reason=st.text(),
)
PLANS = st.builds(
    QuantPlan,
    method=st.text(),
    seed=st.integers(0, 2**31),
    images=st.integers(0, 10**6),
    layers=st.lists(LAYER_PLANS, unique_by=lambda layer: layer.name, max_size=5).map(tuple),
    schema=st.just("vit-export.plan/1"),
)


@given(made=PLANS)
@settings(max_examples=40)
def test_saved_plans_come_back_equal(tmp_path_factory: pytest.TempPathFactory, made: QuantPlan) -> None:
    """Any plan survives plan.json exactly, floats included, and the same plan gives the same bytes."""
    folder = tmp_path_factory.mktemp("plan")
    save(made, folder / "a.json")
    save(read(folder / "a.json"), folder / "b.json")
    assert read(folder / "b.json") == made
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]


def test_a_plan_written_by_hand_may_leave_defaults_out(tmp_path: Path) -> None:
    """Only what has no default must be there."""
    path = tmp_path / "plan.json"
    path.write_text(
        '{"method": "mine", "seed": 0, "images": 1, "layers": [{"name": "head", "quantized": false}]}'
    )
    assert read(path).kept_float() == ("head",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="vit-export.plan/9"), "schema vit-export.plan/9"),
        (lambda d: d.update(method=3), r"Expected `str`, got `int` - at `\$.method`"),
        (lambda d: d.update(methd="mse"), "unknown key methd"),
        (lambda d: d.pop("layers"), "missing required field `layers`"),
        (lambda d: d["layers"][1].update(quantised=True), "unknown key quantised"),
        (lambda d: d["layers"][1]["input"].update(low=9.0), "has the range 9.0 to 2.5"),
        (lambda d: d["layers"][1]["input"].update(low="x"), "Expected `float`"),
        (lambda d: d["layers"][1].update(input=None), "no input range"),
        (lambda d: d["layers"][1].update(weight_bits=1), "1 weight bits"),
        (lambda d: d["layers"].append(d["layers"][0]), "patch_embed.proj is there twice"),
    ],
)
def test_broken_plans_say_what_is_wrong(tmp_path: Path, change: object, message: str) -> None:
    """Each kind of mistake is an input error with its place."""
    path = tmp_path / "plan.json"
    save(plan(RANGES, LAYERS), path)
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read(path)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    """A missing file, text and broken UTF-8 are input errors."""
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "none.json")
    for content in (b"", b"hello", b'{"method": "\xff"}', b"[]", b"\x80\x02."):
        (tmp_path / "plan.json").write_bytes(content)
        with pytest.raises(InputError, match="is not a plan"):
            read(tmp_path / "plan.json")
