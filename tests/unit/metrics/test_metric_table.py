"""Metric tables: what each row is, what is withheld, and that nothing depends on the order of rows."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import sklearn.metrics as reference

from raysynth.core.errors import DataError
from raysynth.core.evidence import Evaluation
from raysynth.metrics.metric_table import COLUMNS, confusion, evaluate
from raysynth.metrics.thresholds import choose_thresholds
from tests.prediction_tables import digits, drawn, predictions

QUICK = Evaluation(bootstraps=100)
HALF = {f"c{j}": 0.5 for j in range(20)}


def rows(table: pa.Table, **wanted: Any) -> list[dict]:
    return [r for r in table.to_pylist() if all(r[k] == v for k, v in wanted.items())]


def one(table: pa.Table, **wanted: Any) -> dict:
    found = rows(table, **wanted)
    assert len(found) == 1, found
    return found[0]


def test_digits_by_argmax_and_one_against_the_rest_equal_scikit_learn() -> None:
    table = digits()
    cuts = choose_thresholds(digits(train=100), "youden")
    found = evaluate(table, cuts, QUICK, "single")
    assert tuple(found.column_names) == COLUMNS
    truth = np.column_stack([table[f"true_{d}"].to_numpy() for d in range(10)]).argmax(axis=1)
    prob = np.column_stack([table[f"prob_{d}"].to_numpy() for d in range(10)]).astype(float)
    called = prob.argmax(axis=1)
    everyone = {"finding": "macro", "subgroup": ""}
    accuracy = one(found, metric="accuracy", **everyone)
    assert accuracy["value"] == pytest.approx(reference.accuracy_score(truth, called))
    assert (accuracy["threshold_rule"], accuracy["threshold"]) == ("argmax", None)
    assert accuracy["ci_low"] < accuracy["value"] < accuracy["ci_high"]
    balanced = one(found, metric="balanced_accuracy", **everyone)
    assert balanced["value"] == pytest.approx(reference.balanced_accuracy_score(truth, called))
    eye = np.eye(10)[truth]
    auroc = one(found, metric="auroc", **everyone)
    assert auroc["value"] == pytest.approx(reference.roc_auc_score(eye, prob, average="macro"))
    assert (auroc["n"], auroc["n_pos"], auroc["n_patients"]) == (600, None, 600)
    f1 = [reference.f1_score(eye[:, d], prob[:, d] >= cuts[str(d)]) for d in range(10)]
    assert one(found, metric="f1", **everyone)["value"] == pytest.approx(np.mean(f1))
    for d in range(10):
        row = one(found, metric="f1", finding=str(d), subgroup="")
        assert row["value"] == pytest.approx(f1[d])
        assert (row["threshold"], row["threshold_rule"]) == (cuts[str(d)], "youden")
        assert row["n_pos"] == (truth == d).sum()
    assert not rows(found, metric="accuracy", finding="3")


def test_unknown_labels_are_left_out_of_their_finding_only() -> None:
    table = drawn()
    found = evaluate(table, HALF, QUICK, "multi")
    for j in range(3):
        known = table.filter(table[f"true_c{j}"].is_valid())
        y, p = known[f"true_c{j}"].to_numpy(), known[f"prob_c{j}"].to_numpy()
        row = one(found, metric="auroc", finding=f"c{j}", subgroup="")
        assert (row["n"], row["n_pos"]) == (len(y), y.sum())
        assert row["n_patients"] == len(set(known["patient_id"].to_pylist()))
        assert row["value"] == pytest.approx(reference.roc_auc_score(y, p))
        accuracy = one(found, metric="accuracy", finding=f"c{j}", subgroup="")
        assert accuracy["value"] == pytest.approx(reference.accuracy_score(y, p >= 0.5))
    values = [one(found, metric="accuracy", finding=f"c{j}", subgroup="")["value"] for j in range(3)]
    assert one(found, metric="accuracy", finding="macro", subgroup="")["value"] == pytest.approx(np.mean(values))


def test_too_few_positives_withhold_the_finding_and_rename_the_macro() -> None:
    truth = np.zeros((200, 3), int)
    truth[:9, 0], truth[:10, 1], truth[:190, 2] = 1, 1, 1
    table = predictions(truth, np.random.default_rng(0).random((200, 3)))
    found = evaluate(table, HALF, QUICK, "multi")
    row = one(found, finding="c0", metric="auroc")
    assert (row["value"], row["ci_low"], row["ci_high"]) == (None, None, None)
    assert (row["n"], row["n_pos"]) == (200, 9)
    kept = [one(found, finding=f, metric="auroc")["value"] for f in ("c1", "c2")]
    assert None not in kept
    assert one(found, finding="macro", metric="auroc")["value"] is None
    assert one(found, finding="macro without c0", metric="auroc")["value"] == pytest.approx(np.mean(kept))
    narrower = evaluate(table, HALF, Evaluation(bootstraps=100, findings=["c1", "c2"]), "multi")
    assert one(narrower, finding="macro", metric="auroc")["value"] == pytest.approx(np.mean(kept))
    assert one(narrower, finding="c0", metric="auroc")["n_pos"] == 9
    nothing = evaluate(table, HALF, Evaluation(bootstraps=100, min_positives=150), "multi")
    assert {r["value"] for r in nothing.to_pylist()} == {None}
    assert {f for f in nothing["finding"].to_pylist() if f.startswith("macro")} == {"macro"}


def test_negatives_count_as_positives_do() -> None:
    truth = np.ones((60, 1), int)
    truth[:9] = 0
    found = evaluate(predictions(truth, np.random.default_rng(0).random((60, 1))), HALF, QUICK, "multi")
    assert one(found, finding="c0", metric="recall")["value"] is None


def test_two_classes_give_their_one_auroc_once() -> None:
    rng = np.random.default_rng(0)
    truth, p = rng.integers(0, 2, 200), rng.random(200)
    table = predictions(np.column_stack([1 - truth, truth]), np.column_stack([1 - p, p]), ["benign", "malignant"])
    found = evaluate(table, {"benign": 0.5, "malignant": 0.5}, QUICK, "single")
    values = [r["value"] for r in rows(found, metric="auroc")]
    assert values == pytest.approx([reference.roc_auc_score(truth, p)] * 2, abs=1e-6)
    assert [r["finding"] for r in rows(found, metric="auroc")] == ["malignant", "macro"]
    assert len(rows(found, metric="f1")) == 3


def test_subgroups_by_every_attribute_ages_by_bins_and_sites() -> None:
    n = 300
    table = drawn(
        n, attr_age=[str(i % 60) for i in range(n)], attr_age_bin=[("<40", ">=40")[i % 60 >= 40] for i in range(n)],
        attr_accession=[f"a{i}" for i in range(n)], site=[("a", "b")[i % 2] for i in range(n)],
    )  # fmt: skip
    found = evaluate(table, HALF, QUICK, "multi")
    ages, sexes, sites = ["age_bin=<40", "age_bin=>=40"], ["sex=F", "sex=M"], ["site=a", "site=b"]
    assert sorted(set(found["subgroup"].to_pylist())) == ["", *ages, *sexes, *sites]
    woman = table.filter(pc.and_(pc.equal(table["attr_sex"], "F"), table["true_c1"].is_valid()))
    row = one(found, subgroup="sex=F", finding="c1", metric="auroc")
    assert row["value"] == pytest.approx(reference.roc_auc_score(woman["true_c1"], woman["prob_c1"]))
    assert (row["n"], row["site"]) == (woman.num_rows, "")
    assert one(found, subgroup="site=b", finding="c1", metric="auroc")["site"] == "b"
    assert {r["threshold"] for r in rows(found, metric="f1", finding="c1")} == {0.5}
    only = evaluate(table, HALF, Evaluation(bootstraps=100, subgroups=["sex"]), "multi")
    assert sorted(set(only["subgroup"].to_pylist())) == ["", *sexes]
    none = evaluate(table, HALF, Evaluation(bootstraps=100, subgroups=[]), "multi")
    assert set(none["subgroup"].to_pylist()) == {""}
    other = evaluate(table, HALF, Evaluation(bootstraps=100, subgroups=["race", "sex"]), "multi")
    assert other.equals(only), "a test set may lack an attribute that others have"


def test_a_single_site_is_no_subgroup_but_named() -> None:
    found = evaluate(drawn(), HALF, QUICK, "multi")
    assert set(found["site"].to_pylist()) == {"a"}
    assert not [s for s in found["subgroup"].to_pylist() if s.startswith("site")]


def test_the_order_of_rows_changes_nothing() -> None:
    table = drawn()
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    assert evaluate(shuffled, HALF, QUICK, "multi") == evaluate(table, HALF, QUICK, "multi")
    other = evaluate(table, HALF, Evaluation(bootstraps=100, seed=1), "multi")
    assert other["value"] == evaluate(table, HALF, QUICK, "multi")["value"]
    assert other["ci_low"] != evaluate(table, HALF, QUICK, "multi")["ci_low"]


def test_test_sets_are_judged_apart() -> None:
    here, there = drawn(), drawn(signal=0.2, test_set=["elsewhere"] * 300)
    found = evaluate(pa.concat_tables([here, there]), HALF, QUICK, "multi")
    assert rows(found, test_set="elsewhere") == evaluate(there, HALF, QUICK, "multi").to_pylist()


def test_one_patient_has_no_interval() -> None:
    found = evaluate(drawn(patient_id=["p"] * 300), HALF, QUICK, "multi")
    row = one(found, finding="c0", metric="auroc", subgroup="")
    assert row["value"] is not None
    assert (row["ci_low"], row["ci_high"], row["n_patients"]) == (None, None, 1)


def test_confusion_by_argmax_and_by_threshold() -> None:
    counts, names = confusion(digits(), {}, "single")
    assert counts.shape == (10, 10)
    assert counts.sum() == 600
    found = evaluate(digits(), dict.fromkeys(names, 0.5), QUICK, "single")
    assert np.trace(counts) / 600 == pytest.approx(one(found, metric="accuracy", subgroup="")["value"])
    table = drawn()
    counts, names = confusion(table, HALF, "multi")
    found = evaluate(table, HALF, QUICK, "multi")
    for ((tn, fp), (fn, tp)), name in zip(counts, names):
        assert tp / (tp + fn) == pytest.approx(one(found, metric="recall", finding=name, subgroup="")["value"])
        assert tn / (tn + fp) == pytest.approx(one(found, metric="specificity", finding=name, subgroup="")["value"])


def test_what_cannot_be_judged_is_refused() -> None:
    table = drawn()
    with pytest.raises(DataError, match=r"evaluation\.findings"):
        evaluate(table, HALF, Evaluation(findings=["c9"]), "multi")
    with pytest.raises(DataError, match=r"thresholds\[c1\]"):
        evaluate(table, {"c0": 0.5}, QUICK, "multi")
    with pytest.raises(DataError, match="image_id: got 'i00000'"):
        evaluate(pa.concat_tables([table, table]), HALF, QUICK, "multi")
    with pytest.raises(DataError, match="exactly one class"):
        evaluate(table, HALF, QUICK, "single")
    with pytest.raises(DataError, match="prob_c0: got nan"):
        evaluate(predictions(np.ones((3, 1), int), np.full((3, 1), np.nan)), HALF, QUICK, "multi")
    with pytest.raises(DataError, match="no images"):
        evaluate(table.slice(0, 0), HALF, QUICK, "multi")


def test_a_thousand_resamplings_of_fourteen_findings_take_seconds() -> None:
    """5,000 images, 14 findings, everyone and two sexes: 4 s of one core; a sort each would be minutes."""
    table = drawn(5000, findings=14)
    start = time.process_time()
    evaluate(table, HALF, Evaluation(), "multi")
    assert time.process_time() - start < 60
