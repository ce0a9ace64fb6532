"""Every weighted metric is scikit-learn's (or torchmetrics') on the same numbers, ties and all."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from raysynth.metrics.discrimination import Argmax, OneVsRest, metrics_of

EVERY = metrics_of("multi")


def expected(truth: np.ndarray, prob: np.ndarray, threshold: float, w: np.ndarray) -> dict[str, float]:
    called = prob >= threshold
    kw = {"sample_weight": w}
    return {
        "auroc": reference.roc_auc_score(truth, prob, **kw),
        "auprc": reference.average_precision_score(truth, prob, **kw),
        "f1": reference.f1_score(truth, called, **kw),
        "precision": reference.precision_score(truth, called, zero_division=0, **kw),
        "recall": reference.recall_score(truth, called, **kw),
        "specificity": reference.recall_score(truth, called, pos_label=0, **kw),
        "brier": reference.brier_score_loss(truth, prob, **kw),
        "accuracy": reference.accuracy_score(truth, called, **kw),
        "balanced_accuracy": reference.balanced_accuracy_score(truth, called, **kw),
    }


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 3)),
        min_size=2, max_size=40,
    ),
    threshold=st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_weighted_metrics_equal_scikit_learn(rows: list[tuple[int, float, int]], threshold: float) -> None:
    truth, prob, w = (np.array(c) for c in zip(*rows))
    cell = OneVsRest(truth.astype(np.int8), prob, np.arange(len(truth)), threshold)
    mine = cell.weighted(w[:, None].astype(float), EVERY)
    positives, negatives = w[truth == 1].sum(), w[truth == 0].sum()
    if positives and negatives:
        for name, value in expected(truth, prob, threshold, w).items():
            assert mine[name][0] == pytest.approx(value, abs=1e-12), name
    else:
        assert np.isnan(mine["auroc"][0])
        assert np.isnan(mine["recall"][0]) == (positives == 0)
        assert np.isnan(mine["specificity"][0]) == (negatives == 0)
        assert np.isnan(mine["f1"][0]) == (positives == 0)


def test_many_weightings_at_once_are_each_of_them_alone() -> None:
    rng = np.random.default_rng(0)
    truth, prob = rng.integers(-1, 2, 200).astype(np.int8), rng.random(200).round(2)
    weights = rng.integers(0, 4, (200, 30)).astype(float)
    rows = np.flatnonzero(rng.random(200) < 0.7)
    cell = OneVsRest(truth, prob, rows, 0.4)
    together = cell.weighted(weights, EVERY)
    seen = rows[truth[rows] >= 0]
    for b in range(30):
        alone = expected(truth[seen], prob[seen], 0.4, weights[seen, b])
        for name, value in alone.items():
            assert together[name][b] == pytest.approx(value, abs=1e-12), name


def test_all_scores_the_same_is_chance() -> None:
    truth = np.array([0, 1, 1, 0, 0], np.int8)
    found = OneVsRest(truth, np.full(5, 0.3), np.arange(5), 0.5).weighted(np.ones((5, 1)), EVERY)
    assert found["auroc"][0] == 0.5
    assert found["auprc"][0] == pytest.approx(2 / 5)
    assert found["precision"][0] == found["f1"][0] == found["recall"][0] == 0
    assert found["specificity"][0] == 1


def test_equal_to_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    from torchmetrics.functional import classification as tm

    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 400).astype(np.int8)
    prob = np.clip(rng.normal(0.3 + 0.3 * truth, 0.25), 0.001, 0.999).astype(np.float32)
    found = OneVsRest(truth, prob.astype(np.float64), np.arange(400), 0.5).weighted(np.ones((400, 1)), EVERY)
    p, y = torch.tensor(prob), torch.tensor(truth.astype(np.int64))
    theirs = {
        "ece": tm.binary_calibration_error(p, y, n_bins=10), "auroc": tm.binary_auroc(p, y),
        "auprc": tm.binary_average_precision(p, y), "f1": tm.binary_f1_score(p, y),
        "precision": tm.binary_precision(p, y), "recall": tm.binary_recall(p, y),
        "specificity": tm.binary_specificity(p, y), "accuracy": tm.binary_accuracy(p, y),
    }  # fmt: skip
    for name, value in theirs.items():
        assert found[name][0] == pytest.approx(float(value), abs=2e-6), name


def test_weighted_ece_is_that_of_repeated_images() -> None:
    rng = np.random.default_rng(2)
    truth, prob = rng.integers(0, 2, 60).astype(np.int8), rng.random(60)
    w = rng.integers(0, 4, 60)
    again = np.repeat(np.arange(60), w)
    mine = OneVsRest(truth, prob, np.arange(60), 0.5).weighted(w[:, None].astype(float), ["ece"])["ece"][0]
    y, p = truth[again], prob[again]
    gaps = [abs((y - p)[(p >= k / 10) & (p < (k + 1) / 10)].sum()) for k in range(10)]
    assert mine == pytest.approx(sum(gaps) / len(again))


def test_argmax_accuracy_and_recalls_equal_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 150)
    truth = np.eye(4, dtype=np.int8)[labels]
    truth[::10] = -1
    prob = rng.dirichlet(np.ones(4), 150)
    weights = rng.integers(0, 3, (150, 8)).astype(float)
    accuracy, recalls = Argmax(truth, prob, np.arange(150)).weighted(weights)
    known = np.arange(150) % 10 > 0
    called = prob.argmax(axis=1)
    for b in range(8):
        kw = {"sample_weight": weights[known, b]}
        assert accuracy[b] == pytest.approx(reference.accuracy_score(labels[known], called[known], **kw))
        theirs = reference.balanced_accuracy_score(labels[known], called[known], **kw)
        assert recalls[:, b].mean() == pytest.approx(theirs)
