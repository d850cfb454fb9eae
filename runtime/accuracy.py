"""How far an artifact is from the FP32 baseline on the same images, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, log10

import numpy as np
import numpy.typing as npt

from vit_export.artifacts import Accuracy, Labels, Logits
from vit_export.errors import InputError

RESAMPLES = 10_000
NEIGHBOURS = 5
_ROWS = 1024  # rows worked on at a time, so that memory does not grow with the number of images
_CELLS = 1 << 23  # similarities held at a time

Flags = npt.NDArray[np.bool_]  # [N]
Ids = npt.NDArray[np.int64]  # [N]
Rows = npt.NDArray[np.float64]  # [rows, K]


def compare(
    reference: Logits,
    logits: Logits,
    labels: Labels | None = None,
    *,
    embeddings: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Accuracy:
    """Compare `logits` with the baseline's `reference`, both float32 [N, K] of the same N images.

    With `labels` ([N], class indices in 0..K-1) also top-1, top-5 and the drop with its interval.
    embeddings: the model has no classifier head (num_classes 0). Agreement is then the share of the
    NEIGHBOURS nearest images (cosine) that both find, KL is not defined, and with labels (any
    integers) top-1 is that of a leave-one-out vote of the neighbours (Caron et al. 2021, section 4.1).
    Raises InputError if the shapes or labels do not fit.
    """
    _check(reference, logits, labels, embeddings)
    if embeddings:
        near, near_reference = neighbours(logits), neighbours(reference)
        agreement = _overlap(near, near_reference)
        right = None if labels is None else _vote(near, labels) == labels
        right_reference = None if labels is None else _vote(near_reference, labels) == labels
        top5 = None
    else:
        choice, choice_reference = predictions(logits), predictions(reference)
        agreement = float(np.mean(choice == choice_reference))
        right = None if labels is None else choice == labels
        right_reference = None if labels is None else choice_reference == labels
        top5 = None if labels is None else _top(logits, labels, 5)
    drop, interval = None, None
    if right is not None and right_reference is not None:
        drop = 100.0 * float(np.mean(right_reference) - np.mean(right))
        interval = drop_interval(right_reference, right, seed=seed, resamples=resamples)
    return Accuracy(
        images=len(logits),
        agreement=agreement,
        sqnr_db=sqnr_db(reference, logits),
        cosine=cosine(reference, logits),
        kl=None if embeddings else kl_divergence(reference, logits),
        top1=None if right is None else float(np.mean(right)),
        top5=top5,
        top1_drop=drop,
        top1_drop_ci95=interval,
    )


def score(logits: Logits, labels: Labels, *, embeddings: bool = False) -> tuple[float, float | None]:
    """Top-1 and top-5 of one set of outputs, as fractions; top-5 is None for embeddings."""
    _check(logits, logits, labels, embeddings)
    if embeddings:
        return float(np.mean(_vote(neighbours(logits), labels) == labels)), None
    return float(np.mean(predictions(logits) == labels)), _top(logits, labels, 5)


def drop_interval(
    right_before: Flags, right_after: Flags, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % interval of the accuracy lost between two classifiers on the same [N] images, in points.

    A paired percentile bootstrap: images are drawn with replacement, and the drop is computed anew.
    An image only says lost, won or unchanged, so a resample is one multinomial draw, exactly. Half an
    image is added to each cell of the 2x2 table first (Agresti and Min 2005): without it, no flip
    among 30 images would read as certainty, where up to one in ten may be lost.
    """
    count = len(right_before)
    lost = int(np.sum(right_before & ~right_after))
    won = int(np.sum(~right_before & right_after))
    shares = np.array([lost + 0.5, won + 0.5, count - lost - won + 1.0]) / (count + 2.0)
    draws = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    low, high = np.percentile(100.0 * (draws[:, 0] - draws[:, 1]) / count, (2.5, 97.5))
    return float(low), float(high)


def images_needed(drop: float, interval: tuple[float, float], limit: float, images: int) -> int | None:
    """How many images would tell on which side of `limit` the drop is; None if these already do.

    Widths shrink with the square root of the number of images; the drop is taken to stay what it is,
    but never closer to the limit than a tenth of it (or 0.1 points), for no number settles a tie.
    """
    low, high = interval
    if high <= limit or low > limit:
        return None
    gap = max(abs(limit - drop), 0.1 * abs(limit), 0.1)
    width = (high - drop) if drop <= limit else (drop - low)
    return max(images + 1, ceil(images * (width / gap) ** 2))


def predictions(logits: Logits) -> Ids:
    """The class of each row: [N, K] to [N]; the first of equals."""
    return np.concatenate([np.argmax(rows, axis=1) for (rows,) in _chunks(logits)])


def sqnr_db(reference: Logits, logits: Logits) -> float | None:
    """10 log10(signal power / error power) over all outputs; None where there is no error."""
    signal, noise = 0.0, 0.0
    for before, after in _chunks(reference, logits):
        signal += float(np.sum(before**2))
        noise += float(np.sum((before - after) ** 2))
    if noise == 0.0:
        return None
    return 10.0 * log10(max(signal, np.finfo(float).tiny) / noise)


def cosine(reference: Logits, logits: Logits) -> float:
    """Mean over images of the cosine between the two rows; rows of zeros agree only with each other."""
    total = 0.0
    for before, after in _chunks(reference, logits):
        total += float(np.sum(np.sum(_unit(before) * _unit(after), axis=1)))
        total += int(np.sum(~before.any(axis=1) & ~after.any(axis=1)))
    return min(1.0, max(-1.0, total / len(logits)))


def kl_divergence(reference: Logits, logits: Logits) -> float:
    """Mean over images of KL(softmax(reference) || softmax(logits)), in nats."""
    total = 0.0
    for before, after in _chunks(reference, logits):
        log_before, log_after = _log_softmax(before), _log_softmax(after)
        total += float(np.sum(np.exp(log_before) * (log_before - log_after)))
    return max(0.0, total / len(logits))


def neighbours(embeddings: Logits, k: int = NEIGHBOURS) -> npt.NDArray[np.int64]:
    """Indices [N, min(k, N - 1)] of the nearest other images by cosine, nearest first."""
    unit = _unit(np.asarray(embeddings, np.float64))
    k = min(k, len(unit) - 1)
    found = []
    step = max(1, _CELLS // len(unit))
    for start in range(0, len(unit), step):
        near = unit[start : start + step] @ unit.T
        near[np.arange(len(near)), np.arange(start, start + len(near))] = -np.inf  # not itself
        found.append(_largest(near, k))
    return np.concatenate(found)


def _largest(rows: Rows, k: int) -> npt.NDArray[np.int64]:
    """Columns of the `k` largest values of each row, largest first, equal ones by column; k < columns."""
    best = np.sort(np.argpartition(-rows, k, axis=1)[:, :k], axis=1)  # a full sort would cost 20 times more
    order = np.argsort(-np.take_along_axis(rows, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)


def _overlap(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> float:
    """Mean share of neighbours that both lists of an image have; 1 where there are none to have."""
    if a.shape[1] == 0:
        return 1.0
    return float(np.mean((a[:, :, None] == b[:, None, :]).any(axis=2)))


def _vote(near: npt.NDArray[np.int64], labels: Labels) -> Labels:
    """The most frequent label among each image's neighbours, the nearest one's where several tie."""
    votes = labels[near]
    support = (votes[:, :, None] == votes[:, None, :]).sum(axis=2)
    winner: Labels = votes[np.arange(len(votes)), np.argmax(support, axis=1)]
    return winner


def _top(logits: Logits, labels: Labels, k: int) -> float:
    """Share of images whose label is among the k largest outputs, ties counted against it."""
    hits = 0
    for start in range(0, len(logits), _ROWS):
        rows = np.asarray(logits[start : start + _ROWS])
        own = rows[np.arange(len(rows)), labels[start : start + _ROWS]]
        hits += int(np.sum(np.sum(rows >= own[:, None], axis=1) <= k))
    return hits / len(logits)


def _chunks(*arrays: Logits) -> Iterator[tuple[Rows, ...]]:
    """The arrays' rows in step, _ROWS at a time, as float64."""
    for start in range(0, len(arrays[0]), _ROWS):
        yield tuple(np.asarray(array[start : start + _ROWS], np.float64) for array in arrays)


def _unit(rows: Rows) -> Rows:
    """Rows of length one; rows of zeros stay zero."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Rows = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
    return unit


def _log_softmax(rows: Rows) -> Rows:
    shifted: Rows = rows - rows.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _check(reference: Logits, logits: Logits, labels: Labels | None, embeddings: bool) -> None:
    if reference.ndim != 2 or reference.shape != logits.shape or len(logits) == 0:
        raise InputError(
            f"outputs to compare must have one shape [N, K], got {reference.shape}, {logits.shape}"
        )
    if labels is None:
        return
    if labels.shape != (len(logits),):
        raise InputError(f"{len(logits)} images but {labels.size} labels")
    if not embeddings and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        raise InputError(
            f"labels run from {labels.min()} to {labels.max()}, the model has {logits.shape[1]} classes"
        )
