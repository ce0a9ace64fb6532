"""Planning numbers are the spread that simulated test sets really have."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from raysynth.core.errors import ConfigError
from raysynth.metrics.power import METRICS, minimum_detectable_difference, sampling_variance


def test_spread_of_simulated_test_sets() -> None:
    """400 test sets of 60 and 140. Exponential scores are the model behind Hanley and McNeil's Q1 and Q2."""
    rng = np.random.default_rng(0)
    pos, neg = rng.exponential(4.0, (400, 60, 1)), rng.exponential(1.0, (400, 1, 140))
    area = (pos > neg).mean(axis=(1, 2))  # true area 4 / (4 + 1)
    assert area.mean() == pytest.approx(0.8, abs=0.01)
    assert area.std() == pytest.approx(np.sqrt(sampling_variance("auroc", 60, 140, 0.8)), rel=0.1)
    tp, fp = rng.binomial(60, 0.7, 400), rng.binomial(140, 18 / 140, 400)  # precision and recall 0.7
    f1 = 2 * tp / (60 + tp + fp)
    assert f1.std() == pytest.approx(np.sqrt(sampling_variance("f1", 60, 140, 0.7)), rel=0.1)
    balanced = (tp / 60 + rng.binomial(140, 0.7, 400) / 140) / 2
    assert balanced.std() == pytest.approx(np.sqrt(sampling_variance("balanced_accuracy", 60, 140, 0.7)), rel=0.1)


def test_difference_is_detected_with_the_power_asked_for() -> None:
    """Accuracy of two classifiers that err alike: correlation 0.5 by a shared cause."""
    found = minimum_detectable_difference("accuracy", 200, 200, assumed=0.8)
    assert found == pytest.approx((1.959964 + 0.841621) * np.sqrt(0.8 * 0.2 / 400), rel=1e-6)
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        shared, own = rng.normal(size=400), rng.normal(size=(2, 400))
        latent = np.sqrt(0.72) * shared + np.sqrt(0.28) * own  # phi correlation of the hits is then about 0.5
        a, b = latent[0] < norm.ppf(0.8 + found / 2), latent[1] < norm.ppf(0.8 - found / 2)
        d = a.astype(float) - b
        hits += abs(d.mean()) / (d.std(ddof=1) / 20) > 1.96
    assert 0.7 < hits / 300 < 0.9


@pytest.mark.parametrize("metric", METRICS)
def test_more_images_and_likelier_errors_detect_less(metric: str) -> None:
    few = minimum_detectable_difference(metric, 20, 100)
    assert minimum_detectable_difference(metric, 80, 400) == pytest.approx(few / 2, rel=0.03)
    assert minimum_detectable_difference(metric, 20, 100, correlation=0.9) < few
    assert minimum_detectable_difference(metric, 20, 100, power=0.9) > few
    assert minimum_detectable_difference(metric, 20, 100, alpha=0.01) > few


def test_a_macro_is_the_mean_over_its_findings() -> None:
    each = [minimum_detectable_difference("auroc", p, n) for p, n in ((20, 80), (50, 50))]
    assert minimum_detectable_difference("auroc", [20, 50], [80, 50]) == pytest.approx(np.mean(each))


@pytest.mark.parametrize("images", [(10, 1000, 1000), (45,) * 10, (30, 170)])
def test_balanced_accuracy_of_classes_is_the_spread_of_simulated_recalls(images: tuple[int, ...]) -> None:
    """Two classifiers of recall 0.8 in every class, half of whose variance is shared: that of the difference is then
    that of one."""
    rng = np.random.default_rng(2)
    balanced = np.mean([rng.binomial(n, 0.8, 20_000) / n for n in images], axis=0)
    found = minimum_detectable_difference("balanced_accuracy", images, [sum(images) - n for n in images], "single")
    assert found == pytest.approx((1.959964 + 0.841621) * balanced.std(), rel=0.02)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ConfigError, match="metric: got 'ece'"):
        minimum_detectable_difference("ece", 10, 10)
    with pytest.raises(ConfigError, match="assumed"):
        minimum_detectable_difference("auroc", 10, 10, assumed=1)
    with pytest.raises(ConfigError, match="n_pos, n_neg"):
        minimum_detectable_difference("auroc", 0, 10)
    with pytest.raises(ConfigError, match="correlation"):
        minimum_detectable_difference("auroc", 10, 10, correlation=1)
    with pytest.raises(ConfigError, match="n_pos, n_neg"):
        minimum_detectable_difference("auroc", [10, 10], [10])
