"""How far two sets of features lie apart: Frechet distance and kernel distance, with intervals by units.

Knows no images, extractors, labels or tables. Input: float features (N, D); output: numbers. No torch.

* Moments are accumulated in float64, batch by batch (Chan 1983, eq. 2.1), so that neither the batches nor the number of
  images matter.
* Frechet distance (Dowson 1982; FID: Heusel 2017, 1706.08500, eq. 6):

      d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)).

  With C = F F^T the last trace is the nuclear norm of F_1^T F_2, which needs no square root of a nearly singular
  product, and is exact where there are fewer images than dimensions.
* Kernel distance (KID; Binkowski 2018, 1801.01401): the unbiased estimate of the squared maximum mean discrepancy under
  k(x, y) = (x . y / D + 1)^3, over all pairs instead of random subsets.

Intervals delete one of `GROUPS` groups of units (patients, source images) at a time, from both sides at once, and use
Student's t. The Frechet distance shrinks as n grows, so its interval is one of its expectation at that n, not of the
distance between the populations. The bootstrap, whose samples repeat images, would shift it as fewer images do, which
is why it is not used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np
from scipy import stats

from raysynth.data.strata import seeded_order

GROUPS = 10


@dataclass
class Moments:
    """Mean and scatter of a stream of features, in float64."""

    n: int
    mean: np.ndarray
    """(D,)"""
    scatter: np.ndarray
    """(D, D): sum of (x - mean)(x - mean)^T."""

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of one batch (B, D), B >= 1."""
        x = np.asarray(features, np.float64)
        mean = x.mean(axis=0)
        x = x - mean
        return cls(len(x), mean, x.T @ x)

    def merge(self, other: Moments) -> Moments:
        """Moments of both streams."""
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), unbiased; needs n >= 2."""
        return self.scatter / (self.n - 1)

    def gaussian(self) -> Gaussian:
        """Mean and a factor of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
        return Gaussian(self.mean, vectors[:, kept] * np.sqrt(values[kept]))


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution N(mean, F F^T), as the Frechet distance sees a set of features."""

    mean: np.ndarray
    """(D,)"""
    factor: np.ndarray
    """F: (D, R), R the rank of the covariance or more."""

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """From features (N, D), N >= 2; with fewer images than dimensions their deviations are the factor."""
        if len(features) > features.shape[1]:
            return Moments.of(features).gaussian()
        x = np.asarray(features, np.float64)
        mean = x.mean(axis=0)
        return cls(mean, (x - mean).T / np.sqrt(len(x) - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance, as FID reports it; >= 0."""
    difference = a.mean - b.mean
    cross = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    return max(0.0, float(difference @ difference + (a.factor**2).sum() + (b.factor**2).sum() - 2 * cross))


def groups_of_units(units: Sequence[str], groups: int) -> np.ndarray:
    """Group (N,) int64 of every image: whole units, about equally many images in each group.

    Args:
        groups: at most the number of different units, so that none is empty.
    """
    names, which, sizes = np.unique(np.asarray(units, np.str_), return_inverse=True, return_counts=True)
    of_unit = np.empty(len(names), np.int64)
    smallest = [(0, g) for g in range(groups)]
    for unit in seeded_order("jackknife", 0, names.tolist()):
        images, g = smallest[0]
        of_unit[unit] = g
        heapreplace(smallest, (images + int(sizes[unit]), g))
    return of_unit[which]


def frechet_standard_error(a: np.ndarray, b: np.ndarray, groups_a: np.ndarray, groups_b: np.ndarray) -> float:
    """Jackknife standard error of the Frechet distance of features (N, D) and (M, D).

    Args:
        groups_a: (N,) group of every image, from `groups_of_units`.
        groups_b: (M,), of the same number of groups.
    """
    return _standard_error([
        frechet_distance(Gaussian.of(a[groups_a != g]), Gaussian.of(b[groups_b != g]))
        for g in _deletable(groups_a, groups_b)
    ])  # fmt: skip


def kernel_distance(
    a: np.ndarray, b: np.ndarray, groups_a: np.ndarray, groups_b: np.ndarray
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy of features (N, D) and (M, D), N, M >= 2, and its standard error.

    The value may be below zero. Groups as in `frechet_standard_error`. The kernel matrix is never held: its sums over
    pairs of groups give the value and every jackknife replicate.
    """
    k = int(groups_a.max()) + 1
    parts_a = [np.asarray(a[groups_a == g], np.float64) for g in range(k)]
    parts_b = [np.asarray(b[groups_b == g], np.float64) for g in range(k)]
    aa, bb, ab = _sums(parts_a, parts_a), _sums(parts_b, parts_b), _sums(parts_a, parts_b)
    n, m = (np.array([len(p) for p in parts]) for parts in (parts_a, parts_b))

    def without(g: int | None) -> float:
        left = [i for i in range(k) if i != g]
        grid = np.ix_(left, left)
        count_a, count_b = int(n[left].sum()), int(m[left].sum())
        within = aa[grid].sum() / (count_a * (count_a - 1)) + bb[grid].sum() / (count_b * (count_b - 1))
        return float(within - 2 * ab[grid].sum() / (count_a * count_b))

    return without(None), _standard_error([without(g) for g in _deletable(groups_a, groups_b)])


def _sums(rows: Sequence[np.ndarray], columns: Sequence[np.ndarray]) -> np.ndarray:
    """(K, K) sums of the kernel over pairs of parts; within one set, a feature is not paired with itself."""
    sums = np.zeros((len(rows), len(columns)))
    same = rows is columns
    for i, x in enumerate(rows):
        for j, y in enumerate(columns):
            if same and j < i:
                sums[i, j] = sums[j, i]
                continue
            kernel = (x @ y.T / x.shape[1] + 1) ** 3
            sums[i, j] = kernel.sum() - (np.trace(kernel) if same and i == j else 0)
    return sums


def _deletable(groups_a: np.ndarray, groups_b: np.ndarray) -> range:
    """The groups, or none where deleting one would leave a side with a single image."""
    sizes = [np.bincount(g) for g in (groups_a, groups_b)]
    return range(len(sizes[0])) if all(s.sum() - s.max() >= 2 for s in sizes) else range(0)


def _standard_error(replicates: Sequence[float]) -> float:
    """NaN where there are no two replicates."""
    k = len(replicates)
    if k < 2:
        return float("nan")
    values = np.asarray(replicates)
    return float(np.sqrt((k - 1) / k * ((values - values.mean()) ** 2).sum()))


def interval(value: float, standard_error: float, groups: int, confidence: float) -> tuple[float | None, float | None]:
    """Student's t interval of a jackknife over `groups` groups; None where there is no standard error."""
    if groups < 2 or not np.isfinite(standard_error):
        return None, None
    half = float(stats.t.ppf((1 + confidence) / 2, groups - 1)) * standard_error
    return value - half, value + half
