"""Can a classifier tell synthetic images from real ones? AUROC of a cross-validated logistic regression on features.

.5: it cannot; 1: always (a classifier two-sample test, Lopez-Paz & Oquab 2017, 1610.06545). Knows no images and no
extractor. Input: float features of two sets and the units (patients, source images) they come from, which are never on
both sides of a fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raysynth.metrics.bootstrap import Resampling, interval
from raysynth.metrics.discrimination import OneVsRest

FOLDS = 5


class Auroc(NamedTuple):
    """AUROC and its percentile interval; None where it cannot be had."""

    value: float | None
    ci_low: float | None = None
    ci_high: float | None = None


def two_sample_auroc(
    a: np.ndarray, b: np.ndarray, units_a: Sequence[str], units_b: Sequence[str], bootstraps: int, confidence: float,
    seed: int,
) -> Auroc:  # fmt: skip
    """How well a linear classifier tells features `b` (N, D) from `a` (M, D), on folds it was not trained on.

    The interval resamples units and keeps the classifiers. The folds' classifiers share most of their training images,
    so their errors agree, and that interval alone would cover .5 in 21 of 30 pairs of samples that do not differ. Its
    halves are therefore widened by sqrt(1 + K n_test / n_train) over K folds, the correction of Nadeau & Bengio
    (Machine Learning 52, 2003, eq. 9).

    Args:
        units_a: (N,) patient or source image of every row; those of `a` and of `b` are kept apart.
        units_b: (M,).
    """
    units = np.array([*(f"a {u}" for u in units_a), *(f"b {u}" for u in units_b)])
    target = np.repeat([0, 1], [len(a), len(b)])
    folds = min(FOLDS, len(set(units_a)), len(set(units_b)))
    if folds < 2:
        return Auroc(None)
    scores = out_of_fold_scores(np.concatenate([a, b]), target, units, folds, seed)
    cell = OneVsRest(target.astype(np.int8), scores, np.arange(len(target)), threshold=0.0)
    resampling = Resampling(np.unique(units, return_inverse=True)[1], bootstraps, seed)
    draws = np.concatenate([cell.weighted(weights, ["auroc"])["auroc"] for weights in resampling.chunks()])
    value = float(draws[0])  # the first weighting is the sample itself
    found = interval(draws[1:], confidence)
    if found.low is None or found.high is None:
        return Auroc(value)
    wider = np.sqrt(1 + folds / (folds - 1))
    low, high = value - wider * (value - found.low), value + wider * (found.high - value)
    return Auroc(value, max(0.0, float(low)), min(1.0, float(high)))


def out_of_fold_scores(
    features: np.ndarray, target: np.ndarray, units: np.ndarray, folds: int, seed: int
) -> np.ndarray:
    """Log odds (N,) that a row is of class 1, by a classifier trained on the other folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.full(len(target), np.nan)
    splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(features, target, units)
    for train, test in splits:
        # Features are often more than images: a strong penalty, the same for every extractor.
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        scores[test] = model.fit(features[train], target[train]).decision_function(features[test])
    return scores
