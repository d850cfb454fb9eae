"""The search takes what the network answers best with, says so, and does the same again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from contracts.small import small_vit
from vit_export import pipeline
from vit_export.artifacts import Decision, EvalSet, Preprocessing, Program, TargetProfile
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import METHODS
from vit_export.calibration.preprocess import Batches, batches
from vit_export.cli_options import choices
from vit_export.errors import UsageError
from vit_export.export.program import trace
from vit_export.export.quantize import quantize
from vit_export.search.choices import AUTO, Choices
from vit_export.search.judge import Judge
from vit_export.search.search import Found, Search, split
from vit_export.search.sensitivity import sensitivity, within

ASYMMETRIC = TargetProfile("asymmetric", 20, "decomposed", convolutions="float")


def pictures(folder: Path, count: int, seed: int) -> EvalSet:
    """Smooth seeded images of 32x32."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    path = folder / f"{seed}.npy"
    np.save(path, coarse.repeat(8, 1).repeat(8, 2))
    return EvalSet(path, Preprocessing((32, 32)), count)


@pytest.fixture(scope="module")
def program() -> Program:
    """A ViT with planted outlier channels in front of qkv and fc1, as trained ViTs have them."""
    model = small_vit()
    for block in model.module.blocks:  # type: ignore[union-attr]
        for norm in (block.norm1, block.norm2):
            norm.weight.data[[3, 17]] *= 30
    return trace(model)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    """Twenty-four calibration images."""
    return pictures(tmp_path_factory.mktemp("calib"), 24, 0)


@pytest.fixture(scope="module")
def found(program: Program, images: EvalSet) -> Found:
    """The automatic search."""
    return Search(program, Batches(images, 8), AUTO, ASYMMETRIC).run()


def _sqnr(reference: Program, found: Found, images: EvalSet) -> float:
    pixels = torch.from_numpy(np.concatenate(list(batches(images, 8))))
    with torch.inference_mode():
        one, other = reference.graph(pixels), quantize(found.program, found.plan, ASYMMETRIC).graph(pixels)
    return float(10 * torch.log10(one.square().sum() / (one - other).square().sum()))


def test_search_beats_plain_ranges_on_fresh_images(
    program: Program, images: EvalSet, found: Found, tmp_path: Path
) -> None:
    """Outliers are moved away: several dB more than min-max, on images no part of the search saw."""
    plain = Search(program, Batches(images, 8), Choices(), ASYMMETRIC).run()
    fresh = pictures(tmp_path, 32, 7)
    assert _sqnr(program, found, fresh) > _sqnr(program, plain, fresh) + 3


def test_every_option_is_listed_and_the_best_is_taken(found: Found) -> None:
    """Each choice has one taken option, that with the highest SQNR among those judged."""
    for choice, count in (("equalize", 2 * len(AUTO.alphas)), ("rounding", 2), ("bias correction", 2)):
        rows = [d for d in found.plan.decisions if d.choice == choice]
        (taken,) = (d for d in rows if d.taken)
        same = [d for d in rows if choice != "equalize" or d.note == taken.note]  # with or without rotation
        assert len(rows) == count and taken.sqnr_db == max(d.sqnr_db for d in same if d.sqnr_db is not None)


def test_rotation_stays_unless_it_clearly_loses(found: Found) -> None:
    """It bounds what new images reach, which images like the calibration ones do not show: 1 dB of trust."""
    off, on = (d for d in found.plan.decisions if d.choice == "rotate")
    assert (off.option, on.option) == ("off", "on") and off.taken is not on.taken
    assert on.taken is ((on.sqnr_db or 0) > (off.sqnr_db or 0) - 1.0)
    (equalized,) = (d for d in found.plan.decisions if d.choice == "equalize" and d.taken)
    assert (equalized.note == "turned") is on.taken


@pytest.mark.parametrize("factor", [1, 30])
def test_an_operator_must_be_worth_it(images: EvalSet, factor: float) -> None:
    """A hidden unit thirty times as loud as the others is divided by an operator, for 0.3 dB or more."""
    model = small_vit()
    for block in model.module.blocks:  # type: ignore[union-attr]
        block.mlp.fc1.weight.data[5] *= factor
        block.mlp.fc2.weight.data[:, 5] /= factor
    program = trace(model)
    found = Search(program, Batches(images, 8), Choices(divide=(False, True)), ASYMMETRIC).run()
    rows = {d.option: d for d in found.plan.decisions if d.choice == "divide outliers"}
    gain = (rows["on"].sqnr_db or 0) - (rows["off"].sqnr_db or 0) if rows else 0
    assert gain > 0.3 if factor == 30 else gain < 3
    added = [len(p.graph.graph.nodes) for p in (program, found.program)]
    assert (added[1] > added[0]) is (gain > 0.3)


def test_the_same_seed_finds_the_same(program: Program, images: EvalSet, found: Found) -> None:
    """The whole plan and every constant."""
    again = Search(program, Batches(images, 8), AUTO, ASYMMETRIC).run()
    assert again.plan == found.plan
    one, other = (f.program.graph.state_dict() for f in (again, found))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_without_choices_it_is_plain_calibration(program: Program, images: EvalSet) -> None:
    """Ranges of every method are those of `calibrate`, and the program is the one given."""
    for method, config in METHODS.items():
        plain = Search(program, Batches(images, 8), Choices(observer=config), ASYMMETRIC).run()
        wanted = calibrate(program, batches(images, 8), config)
        assert plain.program is program and plain.ranges.method == method and not plain.plan.decisions
        for name, seen in wanted.inputs.items():
            assert abs(plain.ranges.inputs[name].low - seen.low) < 1e-6
            assert abs(plain.ranges.inputs[name].high - seen.high) < 1e-6


def test_no_budget_leaves_the_first_option(program: Program, images: EvalSet) -> None:
    """With no time at all each choice keeps its first option and says that the others were not tried."""
    hasty = Search(program, Batches(images, 8), replace(AUTO, budget=0.0), ASYMMETRIC).run()
    skipped = [d for d in hasty.plan.decisions if d.note]
    divided = any(d.choice == "divide outliers" for d in skipped)
    assert len(skipped) == len(AUTO.alphas) - 1 + 3 + divided and not any(d.taken for d in skipped)
    assert hasty.program is program


def test_judges_do_not_calibrate(images: EvalSet) -> None:
    """A quarter of the images is kept aside, drawn by the seed, and no image is in both parts."""
    fit, held = split(Batches(images, 8), 0)
    assert (fit.count, held.count) == (18, 6)
    parts = [{image.tobytes() for batch in part for image in batch} for part in (fit, held)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 24


def _options(**given: Any) -> dict[str, Any]:
    names = ("rotate", "equalize", "divide_outliers", "rounding", "bias_correction", "search_budget")
    return {"calib_method": "auto", **dict.fromkeys(names), **given}


def test_flags_open_and_close_choices() -> None:
    """auto opens all, a method closes all, each flag decides its own; nonsense is refused."""
    assert choices(_options()) == AUTO
    assert choices(_options(calib_method="minmax")) == Choices()
    assert choices(_options(equalize="0.4")).alphas == (0.4,)
    assert choices(_options(rotate="off", divide_outliers="on")).methods[::2] == (
        (False,),
        (True,),
        (False, True),
    )
    assert choices(_options(calib_method="mse", rounding="gptq")).rounding == ("gptq",)
    assert choices(_options(search_budget=0.5)).budget == 30
    for wrong in ({"equalize": "2"}, {"equalize": "much"}, {"rounding": "up"}, {"calib_method": "best"}):
        with pytest.raises(UsageError):
            choices(_options(**wrong))


def test_sensitivity_has_a_row_a_layer(program: Program, images: EvalSet) -> None:
    """Alone a layer costs less than all together; the network without it is no worse by more than noise."""
    search = Search(program, Batches(images, 8), Choices(), ASYMMETRIC, sensitivity=True)
    rows = search.run().plan.sensitivity
    quantised = [layer.name for layer in program.layers]
    assert [row.layer for row in rows] == quantised
    alone = [row.sqnr_alone_db for row in rows if row.sqnr_alone_db is not None]
    rest = [row.sqnr_without_db for row in rows if row.sqnr_without_db is not None]
    assert max(alone) > max(rest) and min(alone) > min(rest) - 1


def test_a_limit_keeps_the_fewest_layers(program: Program, images: EvalSet, found: Found) -> None:
    """Two bits in fc1 of block 0 break the limit: it goes back to float, and the plan says what for."""
    judge, fixed = Judge(program, Batches(images, 8), ASYMMETRIC), replace(found.program, weight_scales={})
    layers = tuple(
        replace(p, weight_bits=2 if p.name == "blocks.0.mlp.fc1" else 8) for p in found.plan.layers
    )
    broken = replace(found.plan, layers=layers)
    limit = judge.score(fixed, found.plan).loss
    assert judge.score(fixed, broken).loss > limit
    rows = sensitivity(judge, fixed, broken, lambda *_: None, without=False)
    kept, decisions = within(judge, fixed, broken, rows, limit)
    assert "blocks.0.mlp.fc1" in kept.kept_float() and len(kept.kept_float()) <= 2
    assert judge.score(fixed, kept).loss <= limit
    assert decisions[0].choice == "keep float" and decisions[-1].choice == "max-drop"


def test_nothing_is_kept_when_the_limit_holds(program: Program, images: EvalSet) -> None:
    """A limit of a hundred points asks for nothing."""
    found = Search(program, Batches(images, 8), Choices(), ASYMMETRIC, max_drop=100.0).run()
    assert not found.plan.kept_float() and not found.plan.sensitivity


def test_with_several_sizes_a_note_says_at_which_int8_was_chosen() -> None:
    """One size needs no name; of two each note has its own."""

    def outcome(side: int) -> Any:
        plan = SimpleNamespace(decisions=(Decision("rounding", "gptq", True, 27.5, 0.985),))
        return SimpleNamespace(baseline=SimpleNamespace(image_size=(side, side)), plan=plan)

    chosen = "rounding gptq; 27.5 dB, agreement 0.985 on images kept aside"
    assert pipeline._decisions([outcome(96)]) == (f"int8: {chosen}",)
    assert pipeline._decisions([outcome(96), outcome(128)]) == (
        f"int8 at 96x96: {chosen}",
        f"int8 at 128x128: {chosen}",
    )
