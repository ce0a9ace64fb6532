"""What checkpoints are chosen by equals scikit-learn's numbers on the same validation images."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import sklearn.metrics as reference

from raysynth.core.schemas import PROBABILITY, TRUE
from raysynth.metrics.validation import validation_scores

CLASSES = ["a", "b", "c", "d"]
N = 80
RNG = np.random.default_rng(0)
SAID = (RNG.multinomial(12, RNG.dirichlet([0.5] * 4, N)) + 1) / 16
"""Sixteenths, which float32 holds: rows add up to one, and there are many ties."""
TRUTH = RNG.choice([0.0, 1.0, np.nan], (N, 4), p=[0.5, 0.2, 0.3])
"""Of four findings, some unknown."""


def scores(truth: np.ndarray, said: np.ndarray, kind: str) -> dict[str, float]:
    columns = {TRUE + c: pa.array(truth[:, i], pa.int8(), from_pandas=True) for i, c in enumerate(CLASSES)}
    columns |= {PROBABILITY + c: pa.array(said[:, i], pa.float32()) for i, c in enumerate(CLASSES)}
    return validation_scores(pa.table(columns), CLASSES, kind)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [0, 1, 3]], ids=["every class", "a class without images"])
def test_single_label_scores_are_scikit_learns(classes: list[int]) -> None:
    right = np.random.default_rng(1).choice([*classes, 3], N)
    truth, guess = np.eye(4)[right], SAID.argmax(axis=1)
    assert scores(truth, SAID, "single") == pytest.approx({
        "auroc": np.mean([reference.roc_auc_score(truth[:, c], SAID[:, c]) for c in classes]),
        "accuracy": reference.accuracy_score(right, guess),
        "balanced_accuracy": reference.balanced_accuracy_score(right, guess),
        "val_loss": reference.log_loss(right, SAID, labels=range(4)),
    })  # fmt: skip


def test_multi_label_scores_are_scikit_learns_over_what_is_known() -> None:
    known = ~np.isnan(TRUTH)
    each = [(TRUTH[k, i], SAID[k, i]) for i, k in enumerate(known.T)]
    assert scores(TRUTH, SAID, "multi") == pytest.approx({
        "auroc": np.mean([reference.roc_auc_score(t, p) for t, p in each]),
        "accuracy": reference.accuracy_score(TRUTH[known], SAID[known] >= 0.5),
        "balanced_accuracy": np.mean([reference.balanced_accuracy_score(t, p >= 0.5) for t, p in each]),
        "val_loss": reference.log_loss(TRUTH[known], SAID[known]),
    })  # fmt: skip


def test_a_finding_of_one_class_has_no_auroc_but_counts_elsewhere() -> None:
    truth = TRUTH.copy()
    truth[:, 0] = 0
    truth[:, 1] = np.nan
    found = scores(truth, SAID, "multi")
    each = [(truth[k, i], SAID[k, i]) for i, k in enumerate((~np.isnan(truth)).T)]
    assert found["auroc"] == pytest.approx(np.mean([reference.roc_auc_score(*each[i]) for i in (2, 3)]))
    recalls = [reference.recall_score(*(each[0][0], each[0][1] >= 0.5), pos_label=0)]
    recalls += [reference.recall_score(t, p >= 0.5, pos_label=v) for t, p in each[2:] for v in (0, 1)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_no_finding_with_both_classes_is_no_better_than_chance() -> None:
    assert scores(np.zeros((N, 4)), SAID, "multi")["auroc"] == 0.5


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_a_certain_error_costs_a_finite_loss(kind: str) -> None:
    truth, said = np.eye(4)[[0, 1]], np.eye(4, dtype=np.float32)[[1, 0]]
    assert scores(truth, said, kind)["val_loss"] == pytest.approx(
        -np.log(1e-7) * (1.0 if kind == "single" else 0.5), rel=1e-3
    )
