"""The smallest difference a test set can be expected to show, before anything is trained.

Two classifiers A and B judged on the same images differ detectably when the true difference is at least

    MDD = (z_{1 - alpha/2} + z_{power}) sqrt(2 (1 - r) Var)

with r the correlation of their two estimates (Hanley & McNeil, Radiology 148, 1983; about 0.5 for similar classifiers
on the same images) and Var the sampling variance of one estimate of size m from n_pos positives and n_neg negatives:

    auroc (Hanley & McNeil, Radiology 143, 1982), with Q1 = m / (2 - m), Q2 = 2 m^2 / (1 + m):
        (m (1 - m) + (n_pos - 1)(Q1 - m^2) + (n_neg - 1)(Q2 - m^2)) / (n_pos n_neg)
    accuracy: m (1 - m) / (n_pos + n_neg)          recall, auprc: m (1 - m) / n_pos          specificity: .. / n_neg
    balanced_accuracy: m (1 - m) (1 / n_pos + 1 / n_neg) / 4 of one finding; in single-label data the mean of the
        recalls of K classes, whose images are apart: sum_k m (1 - m) / n_pos_k / K^2
    f1: m (1 - m) (2 - m) / (2 n_pos)

auprc's is the binomial approximation of Boyd, Eng & Page (ECML 2013). f1's is the delta method on
F1 = 2 J / (1 + J), J = TP / (TP + FP + FN) a proportion, at equal precision and recall. All of them count images as
independent: with several images a patient the truth is larger. Training seeds are not counted either. A planning
number, replaced by `metrics.comparisons` once there are predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

from raysynth.core.errors import ConfigError

METRICS = ("auroc", "auprc", "accuracy", "balanced_accuracy", "f1", "recall", "specificity")


def sampling_variance(metric: str, n_pos: float, n_neg: float, value: float) -> float:
    """Var of the module's docstring: sampling variance of one estimate.

    Args:
        metric: one of `METRICS`.
        value: the metric's expected size, in (0, 1).

    Raises:
        ConfigError: another metric, a value outside (0, 1), no positives or no negatives.
    """
    if metric not in METRICS:
        raise ConfigError("metric", metric, f"one of {', '.join(METRICS)}")
    if not 0 < value < 1:
        raise ConfigError("assumed", value, "between 0 and 1")
    if min(n_pos, n_neg) < 1:
        raise ConfigError("n_pos, n_neg", (n_pos, n_neg), ">= 1 each")
    spread = value * (1 - value)
    if metric == "auroc":
        q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
        return (spread + (n_pos - 1) * (q1 - value**2) + (n_neg - 1) * (q2 - value**2)) / (n_pos * n_neg)
    return {
        "accuracy": spread / (n_pos + n_neg),
        "balanced_accuracy": spread * (1 / n_pos + 1 / n_neg) / 4,
        "recall": spread / n_pos,
        "auprc": spread / n_pos,
        "specificity": spread / n_neg,
        "f1": spread * (2 - value) / (2 * n_pos),
    }[metric]


def minimum_detectable_difference(
    metric: str,
    n_pos: int | Sequence[int],
    n_neg: int | Sequence[int],
    kind: str = "multi",
    assumed: float = 0.8,
    correlation: float = 0.5,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """MDD of the module's docstring.

    Args:
        metric: one of `METRICS`.
        n_pos, n_neg: test images with and without the finding. Of a macro: one of each per finding; the result is
            then the mean over the findings, which is exact if their errors rise and fall together and an upper bound
            if not (single-label balanced_accuracy is one estimate, not such a mean).
        kind: `single` or `multi`.
        assumed: the metric's expected size.
        correlation: r, of the two classifiers' estimates.

    Raises:
        ConfigError: as `sampling_variance`; correlation outside [0, 1); counts of different lengths.
    """
    if not 0 <= correlation < 1:
        raise ConfigError("correlation", correlation, "in [0, 1)")
    positives, negatives = np.atleast_1d(n_pos), np.atleast_1d(n_neg)
    if len(positives) != len(negatives) or not len(positives):
        raise ConfigError("n_pos, n_neg", (n_pos, n_neg), "as many positives as negatives counts, at least one")
    recalls = kind == "single" and metric == "balanced_accuracy"
    of = "recall" if recalls else metric
    variances = np.array([sampling_variance(of, float(p), float(n), assumed) for p, n in zip(positives, negatives)])
    if recalls:
        variances = variances.sum(keepdims=True) / len(variances) ** 2
    z = norm.ppf(1 - alpha / 2) + norm.ppf(power)
    return float(z * np.sqrt(2 * (1 - correlation) * variances).mean())
