"""The few numbers that a checkpoint is chosen by, on real validation images: quick, without intervals.

Input: a predictions table. Does not know test sets: those are judged by `metrics.discrimination`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from sklearn.metrics import roc_auc_score

from raysynth.data.predictions import arrays

LEAST = 1e-7
"""Probabilities are kept this far from 0 and 1 in the loss."""


def validation_scores(predictions: pa.Table, classes: Sequence[str], kind: str) -> dict[str, float]:
    """auroc (macro, one against rest, over findings with both classes), accuracy, balanced_accuracy and val_loss.

    Args:
        kind: single: softmax, accuracy by the most probable class; multi: sigmoid, at 0.5, over known labels.
    """
    truth, said = arrays(predictions, classes)
    known = ~np.isnan(truth)
    areas = []
    for i in range(len(classes)):
        at = known[:, i]
        if 0 < truth[at, i].sum() < at.sum():
            areas.append(roc_auc_score(truth[at, i], said[at, i]))
    said = said.clip(LEAST, 1 - LEAST)
    if kind == "single":
        right, guess = truth.argmax(axis=1), said.argmax(axis=1)
        present = np.unique(right)
        recalls = [float((guess[right == c] == c).mean()) for c in present]
        accuracy, loss = float((right == guess).mean()), float(-np.log(said[np.arange(len(right)), right]).mean())
    else:
        hit = (said >= 0.5) == (np.nan_to_num(truth) == 1)
        accuracy = float(hit[known].mean())
        recalls = [
            float(hit[known[:, i] & (truth[:, i] == v), i].mean())
            for i in range(len(classes)) for v in (0, 1) if (truth[known[:, i], i] == v).any()
        ]  # fmt: skip
        entropy = -np.where(truth == 1, np.log(said), np.log1p(-said))
        loss = float(entropy[known].mean())
    return {
        "auroc": float(np.mean(areas)) if areas else 0.5, "accuracy": accuracy,
        "balanced_accuracy": float(np.mean(recalls)), "val_loss": loss,
    }  # fmt: skip
