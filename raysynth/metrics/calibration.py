"""Whether probabilities mean what they say: reliability in bins of equal width.

Expected calibration error (Naeini, Cooper & Hauskrecht, AAAI 2015) of a finding, weighted by bin:

    ECE = sum_k n_k / n |observed_k - mean probability_k|

Of one finding against the rest, so its macro is the class-wise ECE (Kull 2019, 1910.12656), not the top-label one.
A bin holds its lower edge; the last also holds 1. ECE and Brier score as metrics with intervals are in
`metrics.discrimination`. Knows no patients and no thresholds.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from scipy.stats import binomtest

from raysynth.core.errors import DataError
from raysynth.core.schemas import PROBABILITY, TRUE

ECE_BINS = 10


def bin_of(prob: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """Bin of each probability: (N,) int64 in 0 ... bins - 1."""
    edges = np.linspace(0, 1, bins + 1)
    return np.clip(np.searchsorted(edges, prob, side="right") - 1, 0, bins - 1)


def reliability(predictions: pa.Table, finding: str, bins: int = ECE_BINS, confidence: float = 0.95) -> pa.Table:
    """A reliability diagram's points: one row a bin, also where it is empty.

    Args:
        predictions: table of `core.schemas.predictions_schema`.

    Returns:
        `bin_low, bin_high, n, mean_probability, observed` (share of positives), `ci_low, ci_high` (Wilson 1927,
        images taken as independent); the last four null in an empty bin.

    Raises:
        DataError: no such finding.
    """
    if TRUE + finding not in predictions.column_names:
        known = [n.removeprefix(TRUE) for n in predictions.column_names if n.startswith(TRUE)]
        raise DataError("finding", finding, f"one of {', '.join(known)}")
    seen = predictions.filter(predictions[TRUE + finding].is_valid())
    truth = seen[TRUE + finding].to_numpy()
    prob = seen[PROBABILITY + finding].to_numpy().astype(np.float64)
    place, edges = bin_of(prob, bins), np.linspace(0, 1, bins + 1)
    rows = []
    for k in range(bins):
        inside = place == k
        n, positives = int(inside.sum()), int((truth[inside] == 1).sum())
        row: dict[str, float | None] = {"bin_low": edges[k], "bin_high": edges[k + 1], "n": n}
        if n:
            ci = binomtest(positives, n).proportion_ci(confidence, method="wilson")
            row |= {"mean_probability": prob[inside].mean(), "observed": positives / n}
            row |= {"ci_low": ci.low, "ci_high": ci.high}
        rows.append(row)
    names = ("bin_low", "bin_high", "mean_probability", "observed", "ci_low", "ci_high")
    fields = [(n, pa.float64()) for n in names]
    return pa.Table.from_pylist(rows, schema=pa.schema([*fields[:2], ("n", pa.int64()), *fields[2:]]))
