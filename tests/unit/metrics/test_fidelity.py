"""Distances, discriminator and table against clean-fid, torchmetrics and scikit-learn, on real digits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raysynth.metrics.discriminator import out_of_fold_scores, two_sample_auroc
from raysynth.metrics.distances import (
    Gaussian,
    Moments,
    frechet_distance,
    frechet_standard_error,
    groups_of_units,
    interval,
    kernel_distance,
)
from raysynth.metrics.features import INCEPTION, blind_spot, pixel_features
from raysynth.metrics.fidelity import ALL, Sample, Settings, compare, fidelity_schema, metric_name
from tests.digits import CLASSES, digit_images

IMAGES, TARGETS = digit_images()
FEATURES = pixel_features(IMAGES)
SETTINGS = Settings(CLASSES, min_images=10, bootstraps=200, confidence=0.95, seed=0)


def sample(rows: np.ndarray, features: np.ndarray | None = None, kept: int | None = None) -> Sample:
    """Digits as one of the three sets, every image a patient."""
    x = FEATURES[rows] if features is None else features
    labels = (TARGETS[rows][:, None] == np.arange(10)).astype(np.int8)
    return Sample(Moments.of(x), x[:kept], labels[:kept], [f"p{i}" for i in rows][:kept])


def singles(n: int) -> np.ndarray:
    return groups_of_units([str(i) for i in range(n)], 10)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 299), max_size=6, unique=True), order=st.randoms(use_true_random=False))
def test_moments_do_not_depend_on_batches_or_their_order(cuts: list[int], order: object) -> None:
    x = FEATURES[:300] * 1000 + 5000
    batches = [b for b in np.split(x, sorted(cuts)) if len(b)]
    order.shuffle(batches)  # type: ignore[attr-defined]
    whole = Moments.of(batches[0])
    for batch in batches[1:]:
        whole = whole.merge(Moments.of(batch))
    exact = x.astype(np.float64)
    assert whole.n == 300
    assert whole.mean == pytest.approx(exact.mean(axis=0), rel=1e-10)
    covariance = np.cov(exact.T)
    assert np.abs(whole.covariance - covariance).max() <= 1e-10 * np.abs(covariance).max()


@pytest.mark.parametrize("n", [600, 40])
def test_frechet_distance_is_clean_fids(n: int) -> None:
    """600 images of 64 pixels, and 40, whose covariances are singular."""
    from cleanfid.fid import frechet_distance as reference

    # Some pixels are always black: even 600 digits have a singular covariance. A little noise makes it regular.
    draw = np.random.default_rng(0)
    a, b = (FEATURES[s : s + n] + draw.normal(0, 0.05, (n, 64)) for s in (0, 900))
    expected = reference(a.mean(axis=0), np.cov(a.T), b.mean(axis=0), np.cov(b.T))
    ours = frechet_distance(Gaussian.of(a), Gaussian.of(b))
    assert ours == pytest.approx(float(expected), rel=1e-6 if n > 64 else 1e-3)
    assert frechet_distance(Moments.of(a).gaussian(), Moments.of(b).gaussian()) == pytest.approx(ours, rel=1e-9)
    assert frechet_distance(Gaussian.of(a), Gaussian.of(a)) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_is_torchmetrics() -> None:
    import torch
    from torchmetrics.image.fid import _compute_fid

    a, b = FEATURES[:600], FEATURES[900:1500]
    moments = [torch.from_numpy(m) for x in (a, b) for m in (x.mean(axis=0, dtype=float), np.cov(x.T.astype(float)))]
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(float(_compute_fid(*moments)), rel=1e-5)


def test_frechet_distance_of_gaussians_known_in_closed_form() -> None:
    """Commuting covariances: |d|^2 + sum (sqrt(l_1) - sqrt(l_2))^2."""
    draw = np.random.default_rng(1)
    basis = np.linalg.qr(draw.normal(size=(5, 5)))[0]
    l1, l2, m1, m2 = np.array([4, 1, 0.25, 0, 9.0]), np.array([1, 1, 0, 2, 4.0]), np.zeros(5), np.arange(5.0)
    found = frechet_distance(Gaussian(m1, basis * np.sqrt(l1)), Gaussian(m2, basis * np.sqrt(l2)))
    assert found == pytest.approx(30 + ((np.sqrt(l1) - np.sqrt(l2)) ** 2).sum(), rel=1e-12)


def test_kernel_distance_is_clean_fids_and_torchmetrics() -> None:
    import torch
    from cleanfid.fid import kernel_distance as reference
    from torchmetrics.image.kid import poly_mmd

    a, b = FEATURES[:300].astype(np.float64), FEATURES[900:1200].astype(np.float64)
    value, _ = kernel_distance(a, b, singles(300), singles(300))
    assert value == pytest.approx(reference(a, b, num_subsets=1, max_subset_size=300), rel=1e-9)
    torchs = float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)))
    assert value == pytest.approx(torchs, rel=1e-9)
    # Not affected by how many groups the kernel's sums are kept in, nor by sides of different size.
    one, error = kernel_distance(a, b[:200], np.zeros(300, int), np.zeros(200, int))
    assert np.isnan(error)
    assert one == pytest.approx(kernel_distance(a, b[:200], singles(300), singles(200))[0], rel=1e-9)


def test_groups_hold_whole_units_and_are_of_like_size() -> None:
    units = [f"p{i}" for i in range(60) for _ in range(1 + i % 5)]
    groups = groups_of_units(units, 10)
    assert all(len({g for g, u in zip(groups, units) if u == name}) == 1 for name in set(units))
    sizes = np.bincount(groups)
    assert len(sizes) == 10
    assert sizes.max() - sizes.min() <= 5
    order = np.random.default_rng(0).permutation(len(units))
    assert (groups_of_units([units[i] for i in order], 10) == groups[order]).all()
    giant = groups_of_units(["big"] * 90 + list("abcdefghi"), 10)
    assert (np.bincount(giant) > 0).all()


def test_intervals_of_distances_hold_what_they_promise() -> None:
    """Nominal 90 %: over repeated draws from two known distributions the kernel distance's interval covers the truth,
    and the Frechet distance's covers its own expectation at that n."""
    draw = np.random.default_rng(2)
    n, trials = 80, 150
    kernel, frechet = [], []
    for _ in range(trials):
        a, b = draw.normal(size=(n, 3)), draw.normal(0.4, 1.2, size=(n, 3))
        groups = singles(n)
        value, error = kernel_distance(a, b, groups, groups)
        kernel.append((value, *interval(value, error, 10, 0.9)))
        value = frechet_distance(Gaussian.of(a), Gaussian.of(b))
        frechet.append((value, *interval(value, frechet_standard_error(a, b, groups, groups), 10, 0.9)))
    for found in (np.array(kernel), np.array(frechet)):
        truth = found[:, 0].mean()  # both are means over the draws; the kernel's is the population's (unbiased)
        covered = ((found[:, 1] <= truth) & (truth <= found[:, 2])).mean()
        assert stats.binomtest(int(covered * trials), trials, 0.9).pvalue > 1e-3, covered


def test_patients_with_many_images_widen_the_interval() -> None:
    draw = np.random.default_rng(3)
    a, b = (np.repeat(draw.normal(m, 1, size=(30, 3)), 8, axis=0) for m in (0, 0.5))
    clustered = groups_of_units([f"p{i // 8}" for i in range(240)], 10)
    _, wide = kernel_distance(a, b, clustered, clustered)
    _, narrow = kernel_distance(a, b, singles(240), singles(240))
    assert wide > 1.5 * narrow


def test_discriminator_equals_scikit_learns_cross_validation() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    a, b = FEATURES[TARGETS == 3], FEATURES[TARGETS == 8]
    patients = [f"p{i // 3}" for i in range(len(a))], [f"p{i // 2}" for i in range(len(b))]
    units = np.array([f"a {u}" for u in patients[0]] + [f"b {u}" for u in patients[1]])
    target = np.repeat([0, 1], [len(a), len(b)])
    scores = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)), np.concatenate([a, b]), target,
        groups=units, cv=StratifiedGroupKFold(5, shuffle=True, random_state=7), method="decision_function",
    )  # fmt: skip
    assert out_of_fold_scores(np.concatenate([a, b]), target, units, 5, 7) == pytest.approx(scores)
    found = two_sample_auroc(a, b, *patients, bootstraps=300, confidence=0.95, seed=7)
    assert found.value == pytest.approx(roc_auc_score(target, scores), abs=1e-12)
    assert found.ci_low is not None
    assert found.ci_high is not None
    assert found.ci_low <= found.value <= found.ci_high
    assert found.value > 0.99


def test_discriminator_cannot_tell_two_halves_apart_even_when_patients_have_copies() -> None:
    """Ten copies of every image: a fold that held copies of its training images would find a hundred per cent."""
    draw = np.random.default_rng(4)
    rows = draw.permutation(len(FEATURES))[:160]
    a, b = (np.repeat(FEATURES[r], 5, axis=0) for r in (rows[:80], rows[80:]))
    units = [f"p{i // 5}" for i in range(400)]
    found = two_sample_auroc(a, b, units, units, bootstraps=200, confidence=0.95, seed=0)
    assert found.ci_low is not None
    assert found.ci_low < 0.5 < (found.ci_high or 0)
    assert two_sample_auroc(a[:5], b, units[:5], units, 200, 0.95, 0).value is None


def test_intervals_of_the_discriminator_hold_a_half_where_nothing_differs() -> None:
    """Nominal 95 %. The bootstrap of fixed classifiers alone covers it in about 70 of 100 pairs of samples."""
    units = [str(i) for i in range(100)]
    covered = 0
    for seed in range(60):
        rows = np.random.default_rng(seed).permutation(len(FEATURES))
        found = two_sample_auroc(FEATURES[rows[:100]], FEATURES[rows[100:200]], units, units, 100, 0.95, seed)
        assert found.ci_low is not None
        assert found.ci_high is not None
        covered += found.ci_low <= 0.5 <= found.ci_high
    assert covered >= 54


def test_table_of_real_good_and_bad_images() -> None:
    """Digits against digits, and against digits of half the contrast."""
    rows = np.random.default_rng(5).permutation(len(FEATURES))
    held_out, real, good = rows[:500], rows[500:1000], rows[1000:1500]
    few = np.flatnonzero(TARGETS[good] != 4)[:450]
    bad = sample(good, FEATURES[good] * 0.5)
    same = compare(sample(held_out), sample(real), sample(good), SETTINGS)
    worse = compare(sample(held_out), sample(real), bad, SETTINGS)
    table = {(r["class"], r["metric"]): r for r in same}
    poor = {(r["class"], r["metric"]): r for r in worse}
    assert set(table) == {(c, m) for c in (ALL, *CLASSES) for m in ("frechet", "kernel", "real_vs_synthetic_auroc")}
    f, k, d = (table[ALL, m] for m in ("frechet", "kernel", "real_vs_synthetic_auroc"))
    assert 0.5 < f["ratio"] < 2
    assert f["ratio"] == f["value"] / f["floor"]
    assert k["ci_low"] < 0 < k["ci_high"] or abs(k["value"]) < 1e-3
    assert d["ci_low"] - 0.05 < 0.5 < d["ci_high"] + 0.05
    assert poor[ALL, "frechet"]["ratio"] > 10
    assert poor[ALL, "kernel"]["ci_low"] > max(0, poor[ALL, "kernel"]["floor"])
    assert poor[ALL, "real_vs_synthetic_auroc"]["ci_low"] > 0.9
    assert all(poor[c, "frechet"]["value"] > poor[c, "frechet"]["floor"] for c in CLASSES)
    assert {r["n_real"] for r in same if r["class"] == ALL} == {500}
    assert "singular" in table["0", "frechet"]["note"], "about 50 images of 64 pixels"
    assert "singular" not in f["note"]
    # Sides of one class are equally large, and a class that is rare on one side is withheld with its n.
    assert all(r["n_real"] == r["n_synth"] for r in same)
    five = Settings(CLASSES[:5], 10, 100, 0.95, 0)
    without = compare(sample(held_out[:450]), sample(real[:450]), sample(good[few][:450]), five)
    four = [r for r in without if r["class"] == "4"]
    assert [r["value"] for r in four] == [None] * 3
    assert {r["n_real"] for r in four} == {0}
    assert "withheld" in four[0]["note"]
    assert "class shares" in next(r for r in without if r["class"] == ALL)["note"]
    import pyarrow as pa

    given = {"generator_id": "g", "synthetic_set": "s", "extractor": "pixels"}
    assert pa.Table.from_pylist([{**given, **r} for r in same], schema=fidelity_schema()).num_rows == 33


def test_images_beyond_those_kept_count_in_the_frechet_distance() -> None:
    rows = np.arange(500)
    none = Settings([], 10, 200, 0.95, 0)
    every = compare(sample(rows), sample(rows + 500), sample(rows + 1000), none)
    some = compare(sample(rows, kept=200), sample(rows + 500, kept=200), sample(rows + 1000, kept=200), none)
    assert some[0]["value"] == pytest.approx(every[0]["value"], rel=1e-9)
    assert some[0]["floor"] == pytest.approx(every[0]["floor"], rel=1e-9)
    assert some[0]["n_real"] == 500
    assert "first 200" in some[0]["note"]
    assert some[1]["n_real"] == 200
    assert some[0]["ci_high"] - some[0]["ci_low"] > every[0]["ci_high"] - every[0]["ci_low"]


def test_what_the_extractor_cannot_see_is_said_of_every_number() -> None:
    rows = np.arange(100)
    about = Settings([], 10, 100, 0.95, 0, blind_spot("pixels", 224))
    found = compare(sample(rows), sample(rows + 100), sample(rows + 200), about)
    assert all(r["note"].startswith("16 px of 224: blur") for r in found)
    assert blind_spot("pixels", 16) == blind_spot("inception", 224) == ""


def test_only_inception_makes_it_fid() -> None:
    assert metric_name("frechet", INCEPTION) == "FID (Inception, clean-fid)"
    assert metric_name("kernel", INCEPTION) == "KID (Inception, clean-fid)"
    assert metric_name("frechet", "pixels") == "Frechet distance, pixels features"
    assert "FID" not in metric_name("frechet", "inception_v3")
