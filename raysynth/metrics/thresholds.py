"""Decision thresholds, chosen per finding on real validation images and frozen from then on.

A finding is called where `prob >= threshold`, and a threshold is one of the validation scores:

    youden: max TPR - FPR (Youden, Cancer 3, 1950)        f1: max 2 TP / (2 TP + FP + FN)        half: 0.5

Both criteria are compared as exact integer fractions; of equally good thresholds the highest is taken, which calls
fewest. Reads validation only: no function here takes a test set. Input: predictions of `core.schemas`.
"""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Literal

import numpy as np
import pyarrow as pa
from sklearn.metrics import confusion_matrix_at_thresholds

from raysynth.core.schemas import PROBABILITY, TRUE

Rule = Literal["youden", "f1", "half"]
HALF = 0.5


def choose_thresholds(validation: pa.Table, rule: Rule) -> dict[str, float]:
    """Threshold of every finding.

    Args:
        validation: predictions of the real validation images.
        rule: `evaluation.threshold_rule`.

    Returns:
        finding -> threshold. A finding without a positive or without a negative in validation gives nothing to choose
        by: it keeps 0.5, and the log says so.
    """
    names = [n.removeprefix(TRUE) for n in validation.column_names if n.startswith(TRUE)]
    return {n: _threshold(validation.filter(validation[TRUE + n].is_valid()), n, rule) for n in names}


def _threshold(known: pa.Table, finding: str, rule: Rule) -> float:
    truth = known[TRUE + finding].to_numpy() == 1
    if rule == "half":
        return HALF
    if truth.all() or not truth.any():
        logging.getLogger(__name__).warning(
            "%s: threshold 0.5, as validation has %d positives of %d", finding, truth.sum(), len(truth)
        )
        return HALF
    prob = known[PROBABILITY + finding].to_numpy().astype(np.float64)
    counts = confusion_matrix_at_thresholds(truth, prob)
    tn, fp, fn, tp = (c.astype(np.int64) for c in counts[:4])
    if rule == "youden":
        # J scaled by positives x negatives; float J would let rounding choose between equals.
        quality = tp * (fp + tn) - fp * (tp + fn)
        best = int(quality.argmax())
    else:
        best = max(range(len(tp)), key=lambda i: (Fraction(2 * int(tp[i]), int(2 * tp[i] + fp[i] + fn[i])), -i))
    return float(counts[4][best])
