"""Underdiagnosis: the share of ill people called healthy, by group and pair of groups, and the gap."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raysynth.core.evidence import Evaluation
from raysynth.metrics.underdiagnosis import healthy_finding, underdiagnosis
from tests.prediction_tables import predictions

QUICK = Evaluation(bootstraps=100)
NAMES = ["No Finding", "Edema"]
CUTS = {"No Finding": 0.5, "Edema": 0.5}


def table(n: int = 400) -> pa.Table:
    """Of ill women under 40, all are called healthy; of other ill people, a fifth."""
    rng = np.random.default_rng(0)
    healthy = rng.random(n) < 0.4
    sex, age = rng.choice(["F", "M"], n), rng.choice(["<40", ">=40"], n)
    missed = np.where((sex == "F") & (age == "<40"), True, np.arange(n) % 5 == 0)
    prob = np.where(healthy | missed, 0.9, 0.1)
    return predictions(
        np.column_stack([healthy, ~healthy]).astype(int), np.column_stack([prob, 1 - prob]), NAMES,
        attr_sex=list(sex), attr_age_bin=list(age),
    )  # fmt: skip


def test_rates_and_gap_equal_counting() -> None:
    seen = table()
    found = {(r["metric"], r["subgroup"]): r for r in underdiagnosis(seen, CUTS, QUICK, "multi").to_pylist()}
    rows = seen.to_pylist()
    rates = {}
    groups = {
        "": lambda r: True, "sex=F": lambda r: r["attr_sex"] == "F",
        "sex=F & age_bin=<40": lambda r: r["attr_sex"] == "F" and r["attr_age_bin"] == "<40",
        "sex=M & age_bin=>=40": lambda r: r["attr_sex"] == "M" and r["attr_age_bin"] == ">=40",
    }  # fmt: skip
    for name, belongs in groups.items():
        ill = [r for r in rows if belongs(r) and r["true_No Finding"] == 0]
        rates[name] = np.mean([r["prob_No Finding"] >= 0.5 for r in ill])
        row = found["underdiagnosis", name]
        assert row["value"] == pytest.approx(rates[name])
        assert row["n"] - row["n_pos"] == len(ill)
    assert len(found) == 1 + 4 + 4 + 1
    gap = found["underdiagnosis_gap", ""]
    shown = [r["value"] for (metric, group), r in found.items() if metric == "underdiagnosis" and group]
    assert gap["value"] == pytest.approx(max(shown) - min(shown))
    assert gap["value"] > 0.7
    assert gap["ci_low"] < gap["value"] < 1


def test_small_groups_are_withheld_and_left_out_of_the_gap() -> None:
    found = underdiagnosis(table(60), CUTS, Evaluation(bootstraps=100, min_positives=12), "multi").to_pylist()
    values = {r["subgroup"]: r for r in found if r["metric"] == "underdiagnosis"}
    for name, row in values.items():
        assert (row["value"] is None) == (row["n"] - row["n_pos"] < 12), name
    assert any(r["value"] is None for r in values.values())
    shown = [r["value"] for g, r in values.items() if g and r["value"] is not None]
    gap = next(r for r in found if r["metric"] == "underdiagnosis_gap")
    assert gap["value"] == pytest.approx(max(shown) - min(shown))


def test_no_group_is_no_gap_and_no_healthy_finding_no_rows() -> None:
    alone = underdiagnosis(table(), CUTS, Evaluation(bootstraps=100, subgroups=[]), "multi").to_pylist()
    assert {r["metric"]: r["value"] is None for r in alone} == {"underdiagnosis": False, "underdiagnosis_gap": True}
    other = predictions(np.ones((3, 1), int), np.ones((3, 1)))
    assert underdiagnosis(other, {"c0": 0.5}, QUICK, "multi").num_rows == 0


@pytest.mark.parametrize("name", ["No Finding", "no_finding", "NORMAL", "nf"])
def test_names_of_the_healthy_finding(name: str) -> None:
    assert healthy_finding(["Edema", name]) == name
    assert healthy_finding(["Edema", "nevus"]) is None
