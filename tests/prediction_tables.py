"""Predictions tables for the tests of metrics: real ones (scikit-learn digits) and drawn ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from raysynth.core.schemas import predictions_schema


def predictions(
    truth: np.ndarray, prob: np.ndarray, names: Sequence[str] | None = None, **columns: Sequence[Any]
) -> pa.Table:
    """A predictions table of (N, K) truth (-1: not known) and probabilities; `attr_*` and others by name."""
    truth, prob = np.atleast_2d(truth), np.atleast_2d(prob)
    names = names or [f"c{j}" for j in range(truth.shape[1])]
    n = len(truth)
    table: dict[str, Any] = {
        "image_id": [f"i{i:05d}" for i in range(n)], "test_set": ["test"] * n, "site": ["a"] * n,
        "patient_id": [None] * n,
        **{f"true_{x}": [None if v < 0 else int(v) for v in truth[:, j]] for j, x in enumerate(names)},
        **{f"prob_{x}": prob[:, j] for j, x in enumerate(names)},
    }  # fmt: skip
    table |= columns
    attributes = [c.removeprefix("attr_") for c in columns if c.startswith("attr_")]
    return pa.table(table, schema=predictions_schema(names, attributes))


def drawn(
    n: int = 300, findings: int = 3, signal: float = 1.0, seed: int = 0, per_patient: int = 3, unknown: float = 0.1,
    ties: bool = True, **columns: Sequence[Any],
) -> pa.Table:  # fmt: skip
    """A multi-label table: labels and scores correlated within patients, some labels unknown, scores tied."""
    truth_rng, rng = np.random.default_rng(1234), np.random.default_rng(seed)
    patient = truth_rng.integers(0, n // per_patient, n)
    ill = truth_rng.normal(size=(n // per_patient, findings))[patient] + truth_rng.normal(size=(n, findings))
    truth = (ill > 0.5).astype(int)
    truth[truth_rng.random(truth.shape) < unknown] = -1
    logit = signal * ill + rng.normal(size=ill.shape)
    prob = 1 / (1 + np.exp(-logit))
    prob = prob.round(2) if ties else prob
    defaults = {"patient_id": [f"p{p}" for p in patient], "attr_sex": [("F", "M", None)[p % 3] for p in patient]}
    return predictions(truth, prob, **(defaults | columns))


@lru_cache
def digits(train: int = 60, seed: int = 0) -> pa.Table:
    """Logistic regression from `train` scikit-learn digits, judged on 600 others: single-label, ten classes."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(1197)
    model = LogisticRegression(max_iter=300).fit(images[order[:train]] / 16, labels[order[:train]])
    prob = np.zeros((600, 10))
    prob[:, model.classes_] = model.predict_proba(images[1197:] / 16)
    names = [str(d) for d in range(10)]
    return predictions(np.eye(10, dtype=int)[labels[1197:]], prob, names, site=[("a", "b")[i % 2] for i in range(600)])
