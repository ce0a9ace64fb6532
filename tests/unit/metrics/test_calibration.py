"""A reliability diagram's points are scikit-learn's, with counts and intervals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from raysynth.core.errors import DataError
from raysynth.metrics.calibration import bin_of, reliability
from tests.prediction_tables import digits, drawn


def test_points_equal_scikit_learn_on_digits() -> None:
    table = digits()
    for name in ("0", "8"):
        found = reliability(table, name).to_pylist()
        observed, mean = calibration_curve(table[f"true_{name}"], table[f"prob_{name}"].to_numpy().astype(float))
        full = [r for r in reliability(table, name, bins=5).to_pylist() if r["n"]]
        assert [r["observed"] for r in full] == pytest.approx(observed)
        assert [r["mean_probability"] for r in full] == pytest.approx(mean)
        assert len(found) == 10
        assert sum(r["n"] for r in found) == 600
        assert all(r["ci_low"] <= r["observed"] <= r["ci_high"] for r in found if r["n"])
        assert all(r["observed"] is None for r in found if not r["n"])


def test_edges_belong_to_the_bin_above_and_one_to_the_last() -> None:
    assert bin_of(np.array([0.0, 0.5, 0.9999, 1.0])).tolist() == [0, 5, 9, 9]


def test_unknown_labels_are_left_out_and_an_unknown_finding_refused() -> None:
    table = drawn()
    assert sum(reliability(table, "c0")["n"].to_pylist()) == table["true_c0"].is_valid().to_pylist().count(True)
    with pytest.raises(DataError, match="one of c0, c1, c2"):
        reliability(table, "nodule")
