"""The patient-clustered bootstrap, as integer weights of images.

Resampling patients with replacement keeps a patient's images together (Field & Welsh, J. R. Stat. Soc. B 69, 2007):
in resampling b, image i weighs as often as its patient was drawn. Metrics are computed for all resamplings at once
from these weights, which is what makes 1,000 of them affordable.

Knows patients and numbers, no metric. Resampling b is a function of (seed, b, number of patients): every arm and
every metric of a test set sees the same resamplings, so that differences are paired, and no chunk size matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

CHUNK_CELLS = 2_000_000
"""Images x resamplings held at once: 16 MB of float64, and about six times that at work."""
MAX_DEGENERATE = 0.05
"""An interval is withheld where more of its resamplings than this had no positive (or no negative): the rest would
describe only the resamplings that happen to be measurable."""


class Interval(NamedTuple):
    """A percentile interval; None where it is withheld."""

    low: float | None
    high: float | None
    degenerate: int
    """Resamplings left out because the metric was not defined in them."""


class Resampling:
    """Resamplings of a test set's patients.

    Args:
        patient: (N,) patient numbers from 0.
        bootstraps: resamplings.
        seed: `evaluation.seed`.
    """

    def __init__(self, patient: np.ndarray, bootstraps: int, seed: int) -> None:
        self.patient, self.bootstraps, self.seed = patient, bootstraps, seed
        self.patients = int(patient.max()) + 1

    def chunks(self, cells: int = CHUNK_CELLS) -> Iterator[np.ndarray]:
        """Weights (N, b) float64, chunk after chunk: first a single column of ones, the sample itself, then every
        resampling in order."""
        yield np.ones((len(self.patient), 1))
        step = max(1, cells // len(self.patient))
        for start in range(0, self.bootstraps, step):
            drawn = [self._drawn(b) for b in range(start, min(start + step, self.bootstraps))]
            yield np.ascontiguousarray(np.stack(drawn, axis=1)[self.patient].astype(np.float64))

    def _drawn(self, b: int) -> np.ndarray:
        """How often each patient is in resampling b: (patients,)."""
        draws = np.random.default_rng([self.seed, b]).integers(self.patients, size=self.patients)
        return np.bincount(draws, minlength=self.patients)


def interval(draws: np.ndarray, confidence: float) -> Interval:
    """Percentile interval of bootstrap values.

    Args:
        draws: (B,) values, NaN where the metric was not defined in a resampling.
        confidence: such as 0.95.
    """
    kept = draws[~np.isnan(draws)]
    degenerate = len(draws) - len(kept)
    if not len(kept) or degenerate > MAX_DEGENERATE * len(draws):
        return Interval(None, None, degenerate)
    low, high = np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), degenerate)
