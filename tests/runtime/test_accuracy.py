"""Accuracy: properties of the measures, coverage of the interval, and agreement with plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vit_export.errors import InputError
from vit_export.runtime import accuracy
from vit_export.runtime.accuracy import (
    compare,
    drop_interval,
    images_needed,
    kl_divergence,
    neighbours,
    score,
)

RNG = np.random.default_rng(0)
flags = st.integers(1, 300).flatmap(
    lambda n: st.tuples(arrays(np.bool_, n), arrays(np.bool_, n))
)  # two classifiers on the same n images


def noisy(rows: np.ndarray, noise: float, seed: int = 1) -> np.ndarray:
    """`rows` with normal noise."""
    return rows + np.random.default_rng(seed).normal(0, noise, rows.shape).astype(np.float32)


def test_identical_outputs():
    """An artifact that answers the same loses nothing: agreement 1, cosine 1, KL 0, no noise at all."""
    logits = RNG.normal(size=(500, 10)).astype(np.float32)
    found = compare(logits, logits.copy(), RNG.integers(0, 10, 500))
    assert (found.agreement, found.sqnr_db, found.kl, found.top1_drop) == (1.0, None, 0.0, 0.0)
    assert found.cosine == pytest.approx(1.0)


def test_measures_against_plain_definitions(monkeypatch: pytest.MonkeyPatch):
    """Each number equals its textbook formula on whole arrays, also when computed in pieces."""
    monkeypatch.setattr(accuracy, "_ROWS", 64)
    before = RNG.normal(size=(300, 12)).astype(np.float32)
    after = noisy(before, 0.4)
    labels = RNG.integers(0, 12, 300)
    found = compare(before, after, labels)
    b, a = before.astype(float), after.astype(float)
    assert found.sqnr_db == pytest.approx(10 * np.log10((b**2).sum() / ((a - b) ** 2).sum()))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found.cosine == pytest.approx(cosines.mean())
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (b, a))
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert found.agreement == np.mean(b.argmax(1) == a.argmax(1))
    assert found.top1 == np.mean(a.argmax(1) == labels)
    assert found.top5 == np.mean(
        [label in np.argsort(-row)[:5] for row, label in zip(a, labels, strict=True)]
    )
    assert found.top1_drop == pytest.approx(100 * (np.mean(b.argmax(1) == labels) - found.top1))
    assert score(after, labels) == (found.top1, found.top5)


def test_known_noise_gives_known_sqnr():
    """Noise of a tenth of the signal's size is 20 dB."""
    signal = RNG.normal(size=(4000, 16)).astype(np.float32)
    assert compare(signal, noisy(signal, 0.1)).sqnr_db == pytest.approx(20, abs=0.1)


@given(flags)
@settings(max_examples=60, deadline=None)
def test_interval_holds_the_drop_and_mirrors(pair: tuple[np.ndarray, np.ndarray]):
    """The interval contains the drop, has width, and swapping the sides mirrors it, to about an image."""
    before, after = pair
    drop = 100 * (before.mean() - after.mean())
    low, high = drop_interval(before, after, resamples=4000)
    assert low <= drop <= high
    assert low < high
    mirrored = drop_interval(after, before, resamples=4000)
    assert abs(mirrored[0] + high) <= 0.15 * (high - low) + 101 / len(before)


@given(flags, st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_interval_is_reproducible(pair: tuple[np.ndarray, np.ndarray], seed: int):
    """One seed gives one interval, and the order of the images does not matter."""
    before, after = pair
    order = np.random.default_rng(seed).permutation(len(before))
    assert drop_interval(before, after, seed=seed) == drop_interval(before[order], after[order], seed=seed)


def test_interval_is_a_bootstrap_over_images():
    """It equals, within chance, what drawing images with replacement gives."""
    before = RNG.random(1000) < 0.9
    after = np.where(RNG.random(1000) < 0.06, ~before, before)
    difference = before.astype(int) - after.astype(int)
    drawn = [100 * difference[RNG.integers(0, 1000, 1000)].mean() for _ in range(4000)]
    assert drop_interval(before, after) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=0.25)


@pytest.mark.parametrize(("count", "lost", "won"), [(30, 0.05, 0.0), (100, 0.03, 0.02), (400, 0.02, 0.01)])
def test_interval_covers_the_truth(count: int, lost: float, won: float):
    """Over many experiments the true drop is inside at least 93 % of the time, small sets included."""
    rng = np.random.default_rng(count)
    inside = 0
    for experiment in range(400):
        draw = rng.random(count)
        before = (draw < lost) | (draw > 0.5)
        after = ((draw >= lost) & (draw < lost + won)) | (draw > 0.5)
        low, high = drop_interval(before, after, seed=experiment, resamples=1000)
        inside += low <= 100 * (lost - won) <= high
    assert inside >= 0.93 * 400


def test_no_flip_among_few_images_is_no_certainty():
    """Thirty images without a flip do not exclude a loss of 5 points; three thousand exclude one."""
    same = np.ones(30, bool)
    low, high = drop_interval(same, same)
    assert low < -5 < 5 < high
    low, high = drop_interval(np.ones(3000, bool), np.ones(3000, bool))
    assert -1 < low < high < 1


@pytest.mark.parametrize(
    ("drop", "interval", "limit", "expected"),
    [
        (0.2, (-0.1, 0.5), 1.0, None),  # all of it within the limit
        (2.0, (1.2, 2.8), 1.0, None),  # all of it beyond
        (0.0, (-2.0, 2.0), 1.0, 4 * 400),  # twice the width there may be: four times the images
        (3.0, (-1.0, 7.0), 1.0, 4 * 400),
        (1.0, (0.0, 2.0), 1.0, 100 * 400),  # a tie: settled to a tenth of the limit
    ],
)
def test_images_needed(drop, interval, limit, expected):
    """Images to settle a limit grow with the square of width over distance; None when settled."""
    assert images_needed(drop, interval, limit, 400) == expected


def test_images_needed_would_settle_it():
    """With as many images as told and the same flip rates, the interval leaves the limit."""
    before, after = np.ones(200, bool), np.ones(200, bool)
    after[:1] = False  # 0.5 points
    interval = drop_interval(before, after)
    needed = images_needed(0.5, interval, 1.0, 200)
    assert needed is not None
    times = -(-needed // 200)
    assert drop_interval(np.tile(before, times), np.tile(after, times))[1] <= 1.0


def test_embeddings_use_neighbours():
    """Without a classifier head: neighbours agree under rotation, disagree for unrelated vectors."""
    centers = RNG.normal(size=(6, 32))
    labels = np.repeat(np.arange(6), 20)
    points = (centers[labels] + 0.2 * RNG.normal(size=(120, 32))).astype(np.float32)
    rotation = np.linalg.qr(RNG.normal(size=(32, 32)))[0].astype(np.float32)
    same = compare(points, points @ rotation, labels, embeddings=True)
    assert same.agreement > 0.99
    assert (same.top1, same.top5, same.kl) == (1.0, None, None)
    other = compare(points, RNG.normal(size=(120, 32)).astype(np.float32), labels, embeddings=True)
    assert other.agreement < 0.2
    assert other.top1_drop > 50
    assert score(points, labels, embeddings=True) == (1.0, None)


def test_neighbours_leave_out_the_image_itself():
    """The nearest of four points on a line are the others, nearest first."""
    angles = np.array([0.0, 0.1, 0.3, 0.7])
    points = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert neighbours(points, k=2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert neighbours(points[:1]).shape == (1, 0)
    assert compare(points[:1], points[:1], embeddings=True).agreement == 1.0


@given(arrays(np.float32, (7, 4), elements=st.floats(-(2.0**60), 2.0**60, width=32)), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_extreme_outputs_stay_finite(rows: np.ndarray, seed: int):
    """Zeros, ties and huge values never give NaN, and no fraction leaves its range."""
    other = np.random.default_rng(seed).permutation(rows)
    found = compare(rows, other, np.zeros(7, np.int64))
    assert 0 <= found.agreement <= 1
    assert -1 <= found.cosine <= 1
    assert found.sqnr_db is None or np.isfinite(found.sqnr_db)
    assert kl_divergence(rows, other) >= 0


@pytest.mark.parametrize(
    ("before", "after", "labels"),
    [
        (np.zeros((4, 3)), np.zeros((4, 2)), None),
        (np.zeros((0, 3)), np.zeros((0, 3)), None),
        (np.zeros((4, 3)), np.zeros((4, 3)), np.zeros(3, int)),
        (np.zeros((4, 3)), np.zeros((4, 3)), np.array([0, 1, 2, 3])),
        (np.zeros((4, 3)), np.zeros((4, 3)), np.array([0, 1, 2, -1])),
    ],
)
def test_what_does_not_fit_is_refused(before, after, labels):
    """Other shapes, no images, too few labels, and labels outside the classes are input errors."""
    with pytest.raises(InputError):
        compare(before.astype(np.float32), after.astype(np.float32), labels)
