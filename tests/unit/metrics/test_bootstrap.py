"""Resamplings keep patients together, belong to the patients alone, and give intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from raysynth.metrics.bootstrap import Resampling, interval
from raysynth.metrics.discrimination import OneVsRest


def all_weights(resampling: Resampling, cells: int = 10_000) -> np.ndarray:
    return np.concatenate(list(resampling.chunks(cells)), axis=1)


def test_clustered_resamplings_equal_a_plain_loop_over_patients() -> None:
    rng = np.random.default_rng(0)
    patient = np.unique(rng.integers(0, 40, 120), return_inverse=True)[1]
    truth, prob = rng.integers(0, 2, 120).astype(np.int8), rng.random(120).round(1)
    weights = all_weights(Resampling(patient, 50, seed=3))
    found = OneVsRest(truth, prob, np.arange(120), 0.5).weighted(weights, ["auroc", "auprc"])
    P = patient.max() + 1
    for b in range(50):
        drawn = np.random.default_rng([3, b]).integers(P, size=P)
        rows = np.concatenate([np.flatnonzero(patient == p) for p in drawn])
        assert found["auroc"][1 + b] == pytest.approx(roc_auc_score(truth[rows], prob[rows]), abs=1e-12)
        assert found["auprc"][1 + b] == pytest.approx(average_precision_score(truth[rows], prob[rows]), abs=1e-12)


def test_first_column_is_the_sample_and_patients_move_as_one() -> None:
    patient = np.array([0, 0, 1, 2, 2, 2])
    weights = all_weights(Resampling(patient, 100, seed=0))
    assert weights.shape == (6, 101)
    assert (weights[:, 0] == 1).all()
    assert (weights[0] == weights[1]).all()
    assert (weights[3] == weights[5]).all()
    assert (weights[[0, 2, 3], 1:].sum(axis=0) == 3).all()


@pytest.mark.parametrize("cells", [1, 37, 10_000])
def test_chunks_change_nothing(cells: int) -> None:
    resampling = Resampling(np.arange(20) // 2, 30, seed=1)
    assert (all_weights(resampling, cells) == all_weights(resampling)).all()


def test_another_seed_is_another_resampling() -> None:
    one, other = (all_weights(Resampling(np.arange(20), 30, seed=s)) for s in (0, 1))
    assert (one != other).any()


def test_interval_is_the_percentiles_and_counts_what_it_drops() -> None:
    draws = np.arange(100.0)
    assert interval(draws, 0.9) == pytest.approx((*np.quantile(draws, [0.05, 0.95]), 0))
    draws[:5] = np.nan
    assert interval(draws, 0.9).degenerate == 5
    assert interval(draws, 0.9).low == pytest.approx(np.quantile(draws[5:], 0.05))
    draws[5] = np.nan
    assert interval(draws, 0.9) == (None, None, 6)
    assert interval(np.empty(0), 0.9) == (None, None, 0)


def test_intervals_cover_where_patients_have_several_images_and_ignoring_patients_does_not() -> None:
    """120 test sets of 60 patients x 4 images; the true AUROC is known: Phi(d / sqrt(2 var))."""
    truth_value = 0.7602499389  # Phi(1 / sqrt 2): both classes have variance 1, means 1 apart
    covered = {"patients": 0, "images": 0}
    for trial in range(120):
        rng = np.random.default_rng(trial)
        patient = np.repeat(np.arange(60), 4)
        ill = (np.arange(60) % 2)[patient].astype(np.int8)
        score = ill + np.sqrt(0.8) * rng.normal(size=60)[patient] + np.sqrt(0.2) * rng.normal(size=240)
        for name, owner in (("patients", patient), ("images", np.arange(240))):
            weights = all_weights(Resampling(owner, 200, seed=trial), 100_000)
            draws = OneVsRest(ill, score, np.arange(240), 0.0).weighted(weights, ["auroc"])["auroc"][1:]
            low, high, _ = interval(draws, 0.95)
            assert low is not None
            assert high is not None
            covered[name] += low <= truth_value <= high
    assert covered["patients"] >= 120 * 0.88
    assert covered["images"] <= 120 * 0.80
