"""Paired comparisons: sign, pairing, seeds, refusals, and p values that are uniform where there is no difference."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from raysynth.core.errors import DataError
from raysynth.core.evidence import Evaluation
from raysynth.metrics.comparisons import Scored, compare, holm, seed_noise
from tests.prediction_tables import digits, drawn, predictions

QUICK = Evaluation(bootstraps=300)
HALF = {f"c{j}": 0.5 for j in range(5)}


def arm(signal: float, seeds: int = 3, start: int = 0, **kw: object) -> list[Scored]:
    return [Scored(drawn(signal=signal, seed=start + s, **kw), HALF) for s in range(seeds)]  # type: ignore[arg-type]


def macro_auroc(table: pa.Table) -> float:
    values = []
    for j in range(3):
        known = table.filter(table[f"true_c{j}"].is_valid())
        values.append(roc_auc_score(known[f"true_c{j}"], known[f"prob_c{j}"]))
    return float(np.mean(values))


def test_a_better_arm_is_better_by_the_mean_of_paired_differences() -> None:
    good, bad = arm(1.5), arm(0.3, start=10)
    found = compare(good, bad, "auroc", QUICK, "multi")
    differences = [macro_auroc(g.predictions) - macro_auroc(b.predictions) for g, b in zip(good, bad)]
    assert found.difference == pytest.approx(np.mean(differences))
    assert found.sd_seeds == pytest.approx(np.std(differences, ddof=1))
    assert found.arm_value == pytest.approx(np.mean([macro_auroc(g.predictions) for g in good]))
    assert found.p == pytest.approx(2 / 301)
    assert found.ci_low is not None
    assert found.ci_high is not None
    assert 0 < found.ci_low < found.difference < found.ci_high
    assert (found.n, found.seeds, found.n_patients) == (300, 3, len(set(drawn()["patient_id"].to_pylist())))
    other = compare(bad, good, "auroc", QUICK, "multi")
    assert other.difference == pytest.approx(-found.difference)
    assert other.ci_low == pytest.approx(-found.ci_high, rel=0.1)


def test_the_same_predictions_differ_by_nothing() -> None:
    found = compare(arm(1), arm(1), "f1", QUICK, "multi")
    assert (found.difference, found.ci_low, found.ci_high, found.p, found.sd_seeds) == (0, 0, 0, 1, 0)


def test_pairing_over_images_is_narrower_than_two_separate_intervals() -> None:
    """The same classifier with a little more noise: its errors are on the same images."""
    base = drawn(ties=False)
    rng = np.random.default_rng(5)
    noisy = base
    for j in range(3):
        at = noisy.column_names.index(f"prob_c{j}")
        p = np.clip(noisy[f"prob_c{j}"].to_numpy() + rng.normal(0, 0.02, 300), 0, 1).astype(np.float32)
        noisy = noisy.set_column(at, f"prob_c{j}", pa.array(p))
    one = compare([Scored(base, HALF)], [Scored(noisy, HALF)], "auroc", QUICK, "multi")
    apart = compare([Scored(base, HALF)], [Scored(drawn(seed=9), HALF)], "auroc", QUICK, "multi")
    assert one.standard_error is not None
    assert apart.standard_error is not None
    assert one.standard_error < apart.standard_error / 3
    assert one.sd_seeds is None


def test_row_order_changes_nothing_and_other_images_are_refused() -> None:
    good, bad = arm(1.5), arm(0.3, start=10)
    shuffled = [Scored(s.predictions.take(np.random.default_rng(1).permutation(300)), HALF) for s in bad]
    assert compare(good, shuffled, "auroc", QUICK, "multi") == compare(good, bad, "auroc", QUICK, "multi")
    fewer = [Scored(s.predictions.slice(1), HALF) for s in bad]
    with pytest.raises(DataError, match="1 images in one of two tables only, such as i00000"):
        compare(good, fewer, "auroc", QUICK, "multi")
    relabelled = [Scored(drawn(unknown=0.2), HALF)]
    with pytest.raises(DataError, match=r"true_\*"):
        compare(good[:1], relabelled, "auroc", QUICK, "multi")
    regrouped = [Scored(drawn(patient_id=[None] * 300), HALF)]
    with pytest.raises(DataError, match="patient_id"):
        compare(good[:1], regrouped, "auroc", QUICK, "multi")
    with pytest.raises(DataError, match="seeds"):
        compare(good, bad[:2], "auroc", QUICK, "multi")
    with pytest.raises(DataError, match="seeds"):
        compare([], [], "auroc", QUICK, "multi")
    with pytest.raises(DataError, match="metric: got 'loss'"):
        compare(good, bad, "loss", QUICK, "multi")
    with pytest.raises(DataError, match="finding: got 'c9'"):
        compare(good, bad, "auroc", QUICK, "multi", finding="c9")
    with pytest.raises(DataError, match=r"subgroup: got 'sex=X'.* sex=F, sex=M"):
        compare(good, bad, "auroc", QUICK, "multi", subgroup="sex=X")


def test_seeds_that_disagree_widen_the_interval() -> None:
    calm = compare(arm(1), arm(1, start=10), "auroc", QUICK, "multi")
    mixed = [*arm(2.5, 1), *arm(1, 1), *arm(0.2, 1)]
    wild = compare(mixed, arm(1, start=10), "auroc", QUICK, "multi")
    assert wild.sd_seeds > calm.sd_seeds  # type: ignore[operator]
    assert wild.standard_error > 2 * calm.standard_error  # type: ignore[operator]


def test_findings_subgroups_and_a_withheld_one() -> None:
    good, bad = arm(1.5), arm(0.3, start=10)
    found = compare(good, bad, "recall", QUICK, "multi", finding="c1", subgroup="sex=F")
    seen = good[0].predictions
    keep = [a and b == "F" for a, b in zip(seen["true_c1"].is_valid().to_pylist(), seen["attr_sex"].to_pylist())]
    assert found.n == sum(keep)
    assert found.difference is not None
    few = compare(good, bad, "auroc", Evaluation(bootstraps=100, min_positives=1000), "multi")
    assert (few.difference, few.p, few.n) == (None, None, 300)


def test_a_macro_over_fewer_findings_says_so() -> None:
    truth = np.random.default_rng(0).integers(0, 2, (100, 2))
    truth[:, 1] = 0
    one, other = (
        [Scored(predictions(truth, np.random.default_rng(s).random((100, 2))), HALF)] for s in (1, 2)
    )
    assert compare(one, other, "auroc", QUICK, "multi").finding == "macro without c1"


def test_single_label_accuracy_on_digits() -> None:
    cuts = {str(d): 0.5 for d in range(10)}
    more, fewer = ([Scored(digits(n, s), cuts) for s in range(3)] for n in (200, 20))
    for metric in ("accuracy", "balanced_accuracy", "auroc"):
        found = compare(more, fewer, metric, QUICK, "single")
        assert found.ci_low is not None
        assert found.ci_low > 0, metric


@pytest.mark.parametrize("training_noise", [0.1, 1.5])
def test_p_values_are_about_uniform_where_there_is_no_difference(training_noise: float) -> None:
    """100 test sets, three seeds an arm, each seed a training of its own; at 0.05, 5 are expected to be rejected.
    With much training noise, resampling the three seeds would reject about 20."""
    evaluation = Evaluation(bootstraps=100, subgroups=[], min_positives=5)
    truth = (np.arange(120) % 2)[:, None]
    p = []
    for trial in range(100):
        rng = np.random.default_rng(trial)
        shared = rng.normal(size=(120, 1))
        arms: list[list[Scored]] = [[], []]
        for seeds in arms * 3:
            logit = (2 + rng.normal(0, training_noise)) * truth + shared
            logit += 0.3 * rng.normal(size=(120, 1))
            seeds.append(Scored(predictions(truth, 1 / (1 + np.exp(-logit))), HALF))
        p.append(compare(arms[0], arms[1], "auroc", evaluation, "multi").p)
    rejected = sum(x is not None and x <= 0.05 for x in p)
    assert rejected <= 12, rejected
    assert 25 < sum(x is not None and x <= 0.5 for x in p) < 75


def test_noise_of_three_seeds_gives_students_interval() -> None:
    noise = seed_noise(0.6, 3, 100_000, seed=0)
    expected = stats.t.ppf([0.025, 0.25, 0.975], 2) * 0.6 / np.sqrt(3)
    assert np.quantile(noise, [0.025, 0.25, 0.975]) == pytest.approx(expected, rel=0.04)
    assert (seed_noise(None, 1, 5, seed=0) == 0).all()


def test_standard_error_joins_patients_and_seeds() -> None:
    good, bad = arm(1.5), arm(0.3, start=10)
    found = compare(good, bad, "auroc", QUICK, "multi")
    assert found.standard_error is not None
    assert found.sd_seeds is not None
    assert found.minimum_detectable_difference is not None
    assert found.standard_error > found.sd_seeds / np.sqrt(3)
    assert found.minimum_detectable_difference > 2.8015852 * found.standard_error
    alone = compare(good[:1], bad[:1], "auroc", QUICK, "multi")
    assert alone.standard_error is not None
    assert alone.minimum_detectable_difference == pytest.approx(2.8015852 * alone.standard_error)
    assert alone.ci_high is not None
    assert alone.ci_low is not None
    assert alone.standard_error == pytest.approx((alone.ci_high - alone.ci_low) / 3.92, rel=0.2)


def test_one_patient_alone_has_a_difference_and_no_interval() -> None:
    one, other = ([Scored(drawn(seed=s, patient_id=["p"] * 300), HALF)] for s in (1, 2))
    found = compare(one, other, "auroc", QUICK, "multi")
    assert found.difference is not None
    assert (found.ci_low, found.p, found.standard_error) == (None, None, None)


def test_holm_is_the_stepwise_procedure() -> None:
    rng = np.random.default_rng(0)
    for m in (1, 4, 9):
        p = rng.random(m) ** 3
        adjusted = holm(list(p))
        for alpha in (0.01, 0.05, 0.2, 0.7):
            expected = np.zeros(m, bool)
            for k, i in enumerate(np.argsort(p)):
                if p[i] > alpha / (m - k):
                    break
                expected[i] = True
            assert [a is not None and a <= alpha for a in adjusted] == list(expected)
    assert holm([0.01, 0.04, None, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_no_difference_is_said_that_cannot_be() -> None:
    """Two seeds that disagree bound nothing; a difference of AUROCs still lies between -1 and 1."""
    wild = [*arm(3.0, seeds=1), *arm(-3.0, seeds=1, start=1)]
    found = compare(wild, arm(0.0, seeds=2, start=5), "auroc", QUICK, "multi")
    assert (found.ci_low, found.ci_high) == (-1, 1)
