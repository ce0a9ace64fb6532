"""The answer in words: each case says what it may and not more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from raysynth.report.answer import Answer, answer
from raysynth.report.data import ReportData
from raysynth.report.words import group_words, higher_is_better, interval, number, p_words
from tests.report_data import PRIMARY, arms, comparisons, report_data

SHOWN = {"difference": 0.024, "ci_low": 0.008, "ci_high": 0.040, "p": 0.004, "minimum_detectable_difference": 0.020}
OPEN = {"difference": 0.009, "ci_low": -0.006, "ci_high": 0.024, "p": 0.21, "minimum_detectable_difference": 0.021}


@pytest.fixture(scope="module")
def whole() -> ReportData:
    return report_data()


def said(whole: ReportData, row: dict[str, Any] | None = None, **changes: Any) -> Answer:
    """The answer of `whole` with other numbers in the primary row, and other fields."""
    fields = {f: getattr(whole, f) for f in whole.__dataclass_fields__}
    rows = comparisons(np.random.default_rng(0), **(row or {}))
    return answer(ReportData(**{**fields, "comparisons": rows, **changes}))


def text(a: Answer) -> str:
    return " ".join([a.question, a.headline, *a.shown, *a.not_shown])


def test_a_difference_that_is_shown(whole: ReportData) -> None:
    a = said(whole, SHOWN)
    assert a.verdict == "better"
    assert a.headline == "Yes, on this test set: “mix x3” did better than “real” (AUROC +0.024)."
    assert a.shown == [
        "On 720 test patients the AUROC of “mix x3” was higher than that of “real” by 0.024 (95 % interval +0.008 to "
        "+0.040, over test patients and 3 training seeds; p = 0.004)."
    ]
    facts = dict(a.facts)
    assert facts["test patients"] == "720"
    assert facts["seeds"] == "3"
    assert facts["minimum detectable difference"] == "0.020"
    assert facts["95 % interval"] == "+0.008 to +0.040"


def test_a_harmful_difference_is_said_to_be_worse(whole: ReportData) -> None:
    a = said(whole, {**SHOWN, "difference": -0.024, "ci_low": -0.040, "ci_high": -0.008})
    assert a.verdict == "worse"
    assert a.headline.startswith("No: “mix x3” did worse than “real” (AUROC −0.024)")
    assert "was lower than" in a.shown[0]


def test_less_of_an_error_is_better(whole: ReportData) -> None:
    less = {**SHOWN, "metric": "ece", "difference": -0.02, "ci_low": -0.03, "ci_high": -0.01}
    a = said(whole, less, primary={**PRIMARY, "metric": "ece"})
    assert a.verdict == "better"
    assert "the calibration error (ECE) of “mix x3” was lower" in a.shown[0]
    assert not higher_is_better("underdiagnosis_gap")
    assert higher_is_better("auroc")


def test_not_significant_is_not_no_effect(whole: ReportData) -> None:
    a = said(whole, OPEN)
    assert a.verdict == "open"
    assert a.headline.startswith("Not shown:")
    assert a.shown == ["Differences of AUROC from −0.006 to +0.024 are compatible with these data."]
    assert a.not_shown[0].startswith("That there is no effect")
    assert "smaller than 0.021" in a.not_shown[1]
    assert "cannot be excluded" in a.not_shown[1]


def test_a_shown_difference_below_the_detectable_one_may_be_overstated(whole: ReportData) -> None:
    small = {**SHOWN, "minimum_detectable_difference": 0.030}
    assert any("tend to be overstated" in s for s in said(whole, small).not_shown)
    assert not any("overstated" in s for s in said(whole, SHOWN).not_shown)


def test_interval_and_test_must_agree(whole: ReportData) -> None:
    a = said(whole, {**SHOWN, "p": 0.08})
    assert a.verdict == "open"
    assert any("disagree" in s for s in a.not_shown)
    assert said(whole, {**SHOWN, "p": np.nan}).verdict == "better"


def test_the_level_follows_the_confidence(whole: ReportData) -> None:
    assert said(whole, {**SHOWN, "p": 0.02}, confidence=0.99).verdict == "open"
    assert "99 % interval" in dict(said(whole, SHOWN, confidence=0.99).facts)


def test_no_primary_contrast(whole: ReportData) -> None:
    a = said(whole, SHOWN, primary=None)
    assert a.verdict == "none"
    assert "nothing here is confirmatory" in a.headline
    assert not a.facts
    assert "exploratory" in a.not_shown[0]


def test_a_primary_contrast_that_was_not_computed(whole: ReportData) -> None:
    a = said(whole, comparisons=pd.DataFrame())
    assert a.verdict == "none"
    assert "could not be computed" in a.headline


def test_withheld(whole: ReportData) -> None:
    a = said(whole, dict.fromkeys(SHOWN, np.nan))
    assert a.verdict == "none"
    assert a.headline.startswith("Withheld: the test set has too few cases")
    assert not a.shown


def test_a_finding_left_out_of_the_average_is_named(whole: ReportData) -> None:
    a = said(whole, {**SHOWN, "finding": "macro without 7, 9"})
    assert a.verdict == "better"
    assert any("without 7, 9" in s for s in a.not_shown)


def test_one_seed(whole: ReportData) -> None:
    a = said(whole, {**SHOWN, "seeds": 1}, metrics=whole.metrics[whole.metrics["seed_classifier"] == 0])
    assert any("one training seed an arm" in s for s in a.not_shown)
    assert "over test patients;" in a.shown[0]
    assert not any("one training seed an arm" in s for s in said(whole, SHOWN).not_shown)


def test_only_what_was_repeated_is_called_so(whole: ReportData) -> None:
    m = whole.metrics
    drawn = m.assign(seed_classifier=0, seed_generator=m["seed_classifier"].where(m["arm"].str.startswith("mix")))
    a = said(whole, SHOWN, metrics=drawn)
    assert "over test patients and 3 generator seeds; p" in a.shown[0]
    assert any("What training again would give: there is one training seed an arm" in s for s in a.not_shown)
    (sentence,) = [s for s in a.not_shown if "another choice of real training images" in s]
    assert "only 3 generator seeds were tried" in sentence
    both = m.assign(seed_subset=m["seed_classifier"])
    a = said(whole, SHOWN, metrics=both)
    assert "over test patients and 3 repetitions (training seeds and real subsets); p" in a.shown[0]
    assert not any("training again" in s for s in a.not_shown)
    # One arm's classifier is the same for every seed.
    once = m.assign(seed_classifier=m["seed_classifier"].where(m["arm"] != "real", 0))
    assert any("one training seed of “real”, and" in s for s in said(whole, SHOWN, metrics=once).not_shown)
    # Arms that differ in a seed repeat nothing.
    fixed = m.assign(seed_subset=m["arm"].factorize()[0])
    assert "real subsets" not in " ".join(said(whole, SHOWN, metrics=fixed).shown)


def test_what_only_training_seeds_leave_out(whole: ReportData) -> None:
    a = said(whole, SHOWN)
    (sentence,) = [s for s in a.not_shown if "another choice of real training images" in s]
    assert "only 3 training seeds were tried" in sentence
    metrics = whole.metrics.assign(seed_subset=whole.metrics["seed_classifier"])
    a = said(whole, SHOWN, metrics=metrics)
    assert "another choice of real training images" not in text(a)
    # Arms share their split, whatever they repeat.
    metrics = metrics.assign(seed_generator=metrics["seed_classifier"], seed_split=metrics["seed_classifier"])
    a = said(whole, SHOWN, metrics=metrics)
    (sentence,) = [s for s in a.not_shown if "the intervals do not cover it" in s]
    assert sentence.startswith("What another split would give: only 3 training seeds, ")
    assert "3 splits" not in text(a)


def test_a_donor_generator_is_told_beside_the_upper_bound(whole: ReportData) -> None:
    (sentence,) = [s for s in said(whole, SHOWN).not_shown if "further real images" in s]
    assert "the generator saw 400 real images that the classifier of “mix x3” did not" in sentence
    assert "“upper bound”" in sentence
    assert "reached AUROC 0.9" in sentence
    without = arms()[lambda t: t["strategy"] != "upper_bound"]
    (sentence,) = [s for s in said(whole, SHOWN, arms=without).not_shown if "further real images" in s]
    assert "No arm was trained on those real images" in sentence


def test_no_donor(whole: ReportData) -> None:
    assert "further real images" not in text(said(whole, SHOWN, arms=arms().assign(n_unseen=0)))


def test_controls(whole: ReportData) -> None:
    none = arms()[lambda t: t["strategy"] != "duplicate"]
    assert any("no control" in s for s in said(whole, SHOWN, arms=none).not_shown)
    (sentence,) = [s for s in said(whole, SHOWN).not_shown if "duplicate x3" in s]
    assert "were not tested as a pair" in sentence
    rows = comparisons(np.random.default_rng(0), **SHOWN)
    pair = rows[rows["primary"]].assign(against="duplicate x3", primary=False, p_holm=0.4, ci_low=-0.01)
    (sentence,) = [s for s in said(whole, comparisons=pd.concat([rows, pair])).not_shown if "duplicate x3" in s]
    assert "the difference is +0.024 (−0.010 to +0.040)" in sentence
    found = pd.concat([rows, pair.assign(p_holm=0.01, ci_low=0.01)])
    assert not any("duplicate x3" in s for s in said(whole, comparisons=found).not_shown)


WORSE = {"difference": -0.1, "ci_low": -0.15, "ci_high": -0.05, "p": 0.001, "p_holm": 0.002}
"""Of the primary arm and a control."""


def beside(control: str, row: dict[str, Any], **numbers: Any) -> pd.DataFrame:
    """The comparisons with `row` as the primary one, and that of its arm with a control."""
    rows = comparisons(np.random.default_rng(0), **row)
    return pd.concat([rows, rows[rows["primary"]].assign(against=control, primary=False, **numbers)])


@pytest.mark.parametrize(("row", "begins", "link"), [
    (SHOWN, "Yes, on this test set: “mix x3” did better than “real” (AUROC +0.024)", ", but worse than"),
    (OPEN, "Not shown: the difference between “mix x3” and “real” (AUROC +0.009) could be chance",
     "; “mix x3” did worse than"),
    ({**SHOWN, "difference": -0.024, "ci_low": -0.040, "ci_high": -0.008},
     "No: “mix x3” did worse than “real” (AUROC −0.024)", ", and worse than"),
])  # fmt: skip
def test_a_control_that_did_better_is_in_the_headline(
    whole: ReportData, row: dict[str, Any], begins: str, link: str
) -> None:
    a = said(whole, comparisons=beside("duplicate x3", row, **WORSE))
    assert a.headline == (
        f"{begins}{link} the control “duplicate x3” (real images repeated instead of synthetic ones; −0.100)."
    )
    (sentence,) = [s for s in a.not_shown if "duplicate x3" in s]
    assert sentence == (
        "That it takes synthetic images: the control “duplicate x3” (real images repeated instead of synthetic ones) "
        "was shown to do better than “mix x3”; the difference is −0.100 (−0.150 to −0.050), p = 0.002 after Holm’s "
        "correction."
    )
    # Worse in these data alone: not in the headline, yet told.
    a = said(whole, comparisons=beside("duplicate x3", row, **{**WORSE, "p_holm": 0.4}))
    assert a.headline == f"{begins}."
    assert any("That it does better than the control “duplicate x3”" in s for s in a.not_shown)


def test_every_control_that_did_better_is_named(whole: ReportData) -> None:
    rows = beside("duplicate x3", SHOWN, **WORSE)
    permuted = rows[rows["against"] == "duplicate x3"].assign(against="shuffled")
    more = pd.concat([arms(), arms().iloc[[0]].assign(arm="shuffled", strategy="permuted")])
    a = said(whole, comparisons=pd.concat([rows, permuted]), arms=more)
    assert "the control “duplicate x3” (real images repeated instead of synthetic ones; −0.100) and the control " in (
        a.headline
    )
    assert a.headline.endswith("“shuffled” (synthetic images with shuffled labels; −0.100).")


def test_a_control_with_less_error_did_better(whole: ReportData) -> None:
    row = {**SHOWN, "metric": "ece", "difference": -0.02, "ci_low": -0.03, "ci_high": -0.01}
    primary = {**PRIMARY, "metric": "ece"}
    less = {"difference": 0.1, "ci_low": 0.05, "ci_high": 0.15, "p_holm": 0.002}
    assert "but worse than" in said(whole, comparisons=beside("duplicate x3", row, **less), primary=primary).headline
    more = {"difference": -0.1, "ci_low": -0.15, "ci_high": -0.05, "p_holm": 0.002}
    assert "duplicate x3" not in text(said(whole, comparisons=beside("duplicate x3", row, **more), primary=primary))


def test_a_control_that_is_the_contrast_is_told_once(whole: ReportData) -> None:
    lost = {**WORSE, "against": "duplicate x3"}
    a = said(whole, {**SHOWN, **lost}, primary={**PRIMARY, "against": "duplicate x3"})
    assert a.headline == "No: “mix x3” did worse than “duplicate x3” (AUROC −0.100)."


def test_unequal_compute(whole: ReportData) -> None:
    steps = arms().assign(gradient_steps=[600] * 6 + [900], most_steps=[600] * 6 + [900], step_budget=[600] * 6 + [900])
    (sentence,) = [s for s in said(whole, SHOWN, arms=steps).not_shown if "equal compute" in s]
    assert sentence.endswith("range from 600 to 900.")
    early = arms().assign(gradient_steps=[300, 450] + [600] * 5)
    (sentence,) = [s for s in said(whole, SHOWN, arms=early).not_shown if "equal compute" in s]
    assert "from 300 to 600; early stopping ended “real” and “duplicate x3” before" in sentence
    assert "equal compute" not in text(said(whole, SHOWN))


def test_numbers() -> None:
    assert [number(-0.0004, sign=True), number(-0.02, sign=True), number(None)] == ["0.000", "−0.020", "-"]
    assert number(12345, 0) == "12,345"
    assert interval(np.nan, 1) == "-"
    assert [p_words(0.0002), p_words(0.0341), p_words(np.nan)] == ["p < 0.001", "p = 0.034", "-"]
    assert group_words("age_bin=>=80 & sex=F") == "age bin: >=80 & sex: F"
    assert group_words("") == "everyone"


def test_only_a_metric_of_findings_is_averaged_over_them(whole: ReportData) -> None:
    assert "Judged by AUROC, averaged over the findings, on the test set" in said(whole, SHOWN).question
    once = whole.metrics[whole.metrics["finding"].str.startswith("macro")]
    assert "Judged by AUROC on the test set" in said(whole, SHOWN, metrics=once).question
