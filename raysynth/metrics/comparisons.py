"""Whether one arm is better than another on the same test images, over training seeds.

Two levels. Patients are resampled with replacement, the same ones for both arms and every seed (seed s of one arm is
paired with seed s of the other). Seeds are too few to resample: three differences of one sign, one time in four where
there is none, could never resample to zero. Their mean is a Student t with S - 1 degrees of freedom instead:

    d_b = mean_s d_sb + t_b s / sqrt(S)          d_sb: seed s in resampling b; s: `sd_seeds`; t_b drawn from t_{S - 1}
    p = 2 min(1 + #{d_b <= 0}, 1 + #{d_b >= 0}) / (B + 1), at most 1          (two-sided, never 0)
    standard error^2 = var_b(mean_s d_sb) + s^2 / S
    minimum detectable difference = (t_{1 - alpha/2} + t_{0.8}) standard error    (freedom: Satterthwaite 1946)

Where training noise is ten times that of patients, resampling seeds rejects at p <= 0.05 in 38, 22 and 11 % of 2,000
simulations without a difference, at 2, 3 and 5 seeds; this in 4, 6 and 4 %. What a seed does to single images counts in
both levels, so where that is most of the noise, this rejects in 1 %: it errs on the side of no difference. One
seed alone says nothing of training noise: `sd_seeds` is then None, and interval and p are about these two trained
classifiers, not about the arms.

Knows no experiment: which contrast is confirmatory is the caller's to say; `holm` adjusts the p values of several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.stats import t

from raysynth.core.errors import DataError
from raysynth.core.evidence import Evaluation
from raysynth.metrics.bootstrap import interval
from raysynth.metrics.estimates import MACRO, WITHOUT, Estimate, estimate
from raysynth.metrics.samples import Sample, groups, intersections, read_sample

POWER = 0.8


class Scored(NamedTuple):
    """One seed of an arm: what its classifier said of the test images, and its frozen thresholds."""

    predictions: pa.Table
    thresholds: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """arm - against. Every number that can be None is, where the metric is withheld; with one patient, or too many
    degenerate resamplings, those that come from resampling are."""

    test_set: str
    metric: str
    finding: str
    """As asked for, or `macro without X` where a finding of the fixed set is withheld."""
    subgroup: str
    n: int
    n_patients: int
    seeds: int
    """Classifiers of each arm, every one a training of its own."""
    difference: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    arm_value: float | None = None
    """Mean over seeds."""
    against_value: float | None = None
    sd_seeds: float | None = None
    """Standard deviation of the paired difference over seeds; None with one seed."""
    standard_error: float | None = None
    minimum_detectable_difference: float | None = None
    degenerate: int = 0
    """Resamplings left out, in which the metric was not defined."""


def compare(
    arm: Sequence[Scored],
    against: Sequence[Scored],
    metric: str,
    evaluation: Evaluation,
    kind: str,
    finding: str = MACRO,
    subgroup: str = "",
) -> Comparison:
    """Paired difference of two arms, with its interval over patients and seeds.

    Args:
        arm, against: one entry a seed, in the same order of seeds. No classifier may stand for two seeds: an arm that
            repeats itself would show no training noise.
        metric: any of `metrics.discrimination`.
        kind: `single` or `multi`.
        finding: a finding, or `macro`.
        subgroup: empty, `attribute=value`, or a pair of those as `metrics.samples.intersections` names them.

    Raises:
        DataError: other images, labels or patients in one of the tables, no seeds or not as many in both arms, or no
            such metric, finding or subgroup.
    """
    if not arm or len(arm) != len(against):
        raise DataError("seeds", (len(arm), len(against)), "as many in both arms, at least one")
    samples = [read_sample(s.predictions, kind) for s in (*arm, *against)]
    first = samples[0]
    for other in samples[1:]:
        _check_same(first, other)
    rows = _rows(first, subgroup)
    found = [_estimate(x, s, metric, evaluation, kind, finding, {subgroup: rows})
             for x, s in zip(samples, (*arm, *against))]  # fmt: skip
    e = found[0]
    asked = Comparison(first.test_set, metric, e.finding, subgroup, e.n, e.n_patients, len(arm))
    if e.value is None:
        return asked
    points = np.array([x.value for x in found]).reshape(2, -1)  # (2, S)
    draws = np.stack([x.draws for x in found]).reshape(2, len(arm), -1)  # (2, S, B)
    by_seed = points[0] - points[1]
    sd = float(by_seed.std(ddof=1)) if len(arm) > 1 else None
    by_patients = (draws[0] - draws[1]).mean(axis=0)
    # All metrics here lie in [0, 1]; the t of few seeds knows no bounds.
    drawn = np.clip(by_patients + seed_noise(sd, len(arm), len(by_patients), evaluation.seed), -1.0, 1.0)
    kept = drawn[~np.isnan(drawn)]
    low, high, degenerate = interval(drawn, evaluation.confidence)
    measured = replace(
        asked, difference=float(by_seed.mean()), arm_value=float(points[0].mean()),
        against_value=float(points[1].mean()), sd_seeds=sd, degenerate=degenerate,
    )  # fmt: skip
    if low is None or e.n_patients == 1:
        return measured
    variance, of_seeds = float(np.nanvar(by_patients, ddof=1)), (sd or 0.0) ** 2 / len(arm)
    error = (variance + of_seeds) ** 0.5
    freedom = error**4 / (of_seeds**2 / (len(arm) - 1)) if of_seeds else np.inf
    alpha = 1 - evaluation.confidence
    return replace(
        measured, ci_low=low, ci_high=high, standard_error=error,
        p=min(1.0, 2 * (1 + min(int((kept <= 0).sum()), int((kept >= 0).sum()))) / (len(kept) + 1)),
        minimum_detectable_difference=float(error * (t.ppf(1 - alpha / 2, freedom) + t.ppf(POWER, freedom))),
    )  # fmt: skip


def seed_noise(sd: float | None, seeds: int, bootstraps: int, seed: int) -> np.ndarray:
    """t_b s / sqrt(S) of the module's docstring: (B,), zeros with one seed.

    Args:
        sd: s, standard deviation of the paired difference over seeds.
        seeds: S.
        bootstraps: B.
        seed: `evaluation.seed`.
    """
    if sd is None:
        return np.zeros(bootstraps)
    # Patient resampling b is seeded by [seed, b], which is [seed, b, 0]: this stream is apart from all of them.
    return np.random.default_rng([seed, 0, 1]).standard_t(seeds - 1, size=bootstraps) * sd / seeds**0.5


def _estimate(
    sample: Sample, scored: Scored, metric: str, evaluation: Evaluation, kind: str, finding: str,
    group: Mapping[str, np.ndarray],
) -> Estimate:  # fmt: skip
    if finding != MACRO and finding not in sample.names:
        raise DataError("finding", finding, f"macro, or one of {', '.join(sample.names)}")
    findings = None if finding == MACRO else [finding]
    found = estimate(sample, scored.thresholds, evaluation, kind, group, [metric], findings)
    matching = [e for e in found if e.finding == finding or (finding == MACRO and e.finding.startswith(WITHOUT))]
    if not matching:
        raise DataError("metric", metric, f"a metric that {finding} has in {kind}-label data")
    return next((e for e in matching if e.value is not None), matching[0])


def _rows(sample: Sample, subgroup: str) -> np.ndarray:
    attributes = list(sample.attributes) if subgroup else []
    known = groups(sample, [*attributes, "site"] if subgroup else [])
    if " & " in subgroup and subgroup not in known:
        known |= intersections(sample, [*attributes, "site"])
    if subgroup not in known:
        raise DataError("subgroup", subgroup, f"one of {', '.join(n for n in known if n)}, or empty")
    return known[subgroup]


def _check_same(one: Sample, other: Sample) -> None:
    """Raises DataError unless both are the same images with the same truth."""
    if one.image_ids != other.image_ids:
        apart = sorted(set(one.image_ids) ^ set(other.image_ids))
        got = f"{len(apart)} images in one of two tables only, such as {apart[0]}"
        raise DataError("image_id", got, "the same test images in every arm", "Predict the same test set again.")
    if (one.test_set, one.names) != (other.test_set, other.names):
        both = ((one.test_set, one.names), (other.test_set, other.names))
        raise DataError("test_set, findings", both, "the same in every arm")
    for what, a, b in (("true_*", one.truth, other.truth), ("patient_id", one.patient, other.patient)):
        if not np.array_equal(a, b):
            raise DataError(what, "different values of the same images", "the same in every arm")


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values of a family of comparisons (Holm, Scand. J. Stat. 6, 1979), in the order given: the k-th
    smallest of m is multiplied by m - k + 1, made rising, and cut at 1. A withheld one (None) stays so and is not
    counted in m."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for k, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - k)))
        adjusted[i] = largest
    return adjusted
