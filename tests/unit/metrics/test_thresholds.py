"""Thresholds are the best of those validation scores, the highest of equals, and need both classes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_curve

from raysynth.metrics.thresholds import choose_thresholds
from tests.prediction_tables import digits, predictions


def table(truth: list[int], prob: list[float]) -> pa.Table:
    return predictions(np.array(truth)[:, None], np.array(prob)[:, None], ["x"])


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.2, 0.4, 0.8])), min_size=2, max_size=30))
@settings(max_examples=40, deadline=None)
def test_no_score_is_a_better_threshold_and_no_equal_one_is_higher(rows: list[tuple[int, float]]) -> None:
    truth, prob = (np.array(c) for c in zip(*rows))
    if 0 < truth.sum() < len(truth):
        seen = table(list(truth), list(prob))
        exact = seen["prob_x"].to_numpy().astype(float)

        def youden(t: float) -> float:
            called = exact >= t
            return round(called[truth == 1].mean() - called[truth == 0].mean(), 12)

        def f1(t: float) -> float:
            return round(f1_score(truth, exact >= t), 12)

        for rule, quality in (("youden", youden), ("f1", f1)):
            chosen = choose_thresholds(seen, rule)["x"]  # type: ignore[arg-type]
            best = max(quality(t) for t in set(exact))
            assert chosen == max(t for t in set(exact) if quality(t) == best)


def test_youden_is_that_of_scikit_learns_curve_on_digits() -> None:
    seen = digits()
    chosen = choose_thresholds(seen, "youden")
    for name, threshold in chosen.items():
        truth, prob = seen[f"true_{name}"].to_numpy(), seen[f"prob_{name}"].to_numpy()
        fpr, tpr, cuts = roc_curve(truth, prob)
        called = prob >= threshold
        assert called[truth == 1].mean() - called[truth == 0].mean() == pytest.approx((tpr - fpr).max())
        assert threshold in cuts


def test_unknown_labels_are_not_looked_at() -> None:
    assert choose_thresholds(table([1, 0, -1], [0.75, 0.25, 0.99]), "youden") == {"x": 0.75}


@pytest.mark.parametrize("truth", [[0, 0, 0], [1, 1, 1], [-1, -1, -1]])
def test_one_class_alone_keeps_half_and_says_so(truth: list[int], caplog: pytest.LogCaptureFixture) -> None:
    assert choose_thresholds(table(truth, [0.1, 0.2, 0.9]), "f1") == {"x": 0.5}
    assert "x: threshold 0.5" in caplog.text


def test_half_is_half() -> None:
    assert set(choose_thresholds(digits(), "half").values()) == {0.5}
