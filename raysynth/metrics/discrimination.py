"""Metrics of one finding against the rest, and of the argmax over classes, for many weightings of the images at once.

Weights (N, B): column b weighs the images as resampling b does (`metrics.bootstrap`). A column of ones gives the
plain metric, by the same code, so that an interval can describe no other definition than its value. All equal
scikit-learn's with `sample_weight`:

    AUROC = sum_i w_i (N_<(s_i) + N_=(s_i) / 2) / (P N)        over positives i, ties by midranks (Mann-Whitney)
    AUPRC = sum_i w_i TP_>=(s_i) / (TP_>=(s_i) + FP_>=(s_i)) / P        average precision, not interpolated

with P, N the weights of positives and negatives. scikit-learn's own take one weighting a call and sort each time:
1,000 resamplings of 14 findings in 20 groups would be 280,000 sorts. Called positive is `prob >= threshold`;
precision is 0 where nothing is. Values that a weighting leaves undefined (no positives, ...) are NaN.

Knows no patients, intervals or tables.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from raysynth.metrics.calibration import ECE_BINS, bin_of

FINDING_METRICS = ("auroc", "auprc", "f1", "precision", "recall", "specificity", "brier", "ece")
"""Metrics of a finding in every kind of data."""
MULTI_METRICS = ("accuracy", "balanced_accuracy")
"""Multi-label findings have these too; in single-label data they belong to the argmax over all classes."""
AT_THRESHOLD = frozenset({"f1", "precision", "recall", "specificity", *MULTI_METRICS})


class OneVsRest:
    """One finding against the rest in a group of images, sorted once for any number of weightings.

    Args:
        truth: (N,) int8 of all images: 1, 0, -1 not known (left out).
        prob: (N,) float64.
        rows: (M,) the group's rows.
        threshold: called positive from here on.
    """

    def __init__(self, truth: np.ndarray, prob: np.ndarray, rows: np.ndarray, threshold: float) -> None:
        def falling(value: int) -> np.ndarray:
            found = rows[truth[rows] == value]
            return found[np.argsort(-prob[found], kind="stable")]

        self.pos, self.neg = falling(1), falling(0)
        self.prob_pos, self.prob_neg = prob[self.pos], prob[self.neg]
        # For each positive: how many places of either falling order have a score at least as high, or higher.
        self.pos_ge = _at_least(self.prob_pos, self.prob_pos)
        self.neg_ge = _at_least(self.prob_neg, self.prob_pos)
        self.neg_gt = _above(self.prob_neg, self.prob_pos)
        self.pos_called = int(_at_least(self.prob_pos, threshold))
        self.neg_called = int(_at_least(self.prob_neg, threshold))

    def weighted(self, weights: np.ndarray, wanted: Collection[str]) -> dict[str, np.ndarray]:
        """`wanted` metrics of every weighting.

        Args:
            weights: (N, B) float64, rows as of `truth`.

        Returns:
            name -> (B,) float64, NaN where not defined.
        """
        w_pos, w_neg = weights[self.pos], weights[self.neg]
        c_pos, c_neg = _cumulative(w_pos), _cumulative(w_neg)
        P, N = c_pos[-1], c_neg[-1]
        tp, fp = c_pos[self.pos_called], c_neg[self.neg_called]
        found: dict[str, np.ndarray] = {}
        with np.errstate(divide="ignore", invalid="ignore"):
            recall, specificity = tp / P, (N - fp) / N
            if "auroc" in wanted:
                higher = c_neg[self.neg_ge]
                if not np.array_equal(self.neg_ge, self.neg_gt):
                    higher = (higher + c_neg[self.neg_gt]) / 2
                found["auroc"] = 1 - np.einsum("ib,ib->b", w_pos, higher) / (P * N)
            if "auprc" in wanted:
                reached = c_pos[self.pos_ge]
                precision = reached / (reached + c_neg[self.neg_ge])
                # 0 / 0 above the first image that has weight; its own weight there is 0.
                found["auprc"] = np.einsum("ib,ib->b", w_pos, np.nan_to_num(precision)) / P
            found["f1"] = 2 * tp / np.where(P > 0, P + tp + fp, np.nan)
            found["precision"] = np.where(P > 0, tp / np.maximum(tp + fp, 1e-300), np.nan)
            found["recall"], found["specificity"] = recall, specificity
            found["accuracy"] = (tp + N - fp) / (P + N)
            found["balanced_accuracy"] = (recall + specificity) / 2
            if "brier" in wanted:
                found["brier"] = ((1 - self.prob_pos) ** 2 @ w_pos + self.prob_neg**2 @ w_neg) / (P + N)
            if "ece" in wanted:
                found["ece"] = self._miscalibrated(w_pos, w_neg) / (P + N)
        return {name: found[name] for name in wanted}

    def _miscalibrated(self, w_pos: np.ndarray, w_neg: np.ndarray) -> np.ndarray:
        """sum over bins of |sum_i w_i (y_i - p_i)|: (B,)."""
        bins_pos, bins_neg = bin_of(self.prob_pos), bin_of(self.prob_neg)
        total = np.zeros(w_pos.shape[1])
        for k in range(ECE_BINS):
            # Sorted by score, so a bin is one stretch of either.
            p, n = _stretch(bins_pos, k), _stretch(bins_neg, k)
            total += np.abs((1 - self.prob_pos[p]) @ w_pos[p] - self.prob_neg[n] @ w_neg[n])
        return total


class Argmax:
    """Accuracy of the most probable class in a group of single-label images.

    Args:
        truth: (N, K) int8, one 1 a row; rows where nothing is known are left out.
        prob: (N, K) float64; the first of equally probable classes is taken.
        rows: (M,) the group's rows.
    """

    def __init__(self, truth: np.ndarray, prob: np.ndarray, rows: np.ndarray) -> None:
        self.rows = rows[(truth[rows] == 1).any(axis=1)]
        self.is_class = (truth[self.rows] == 1).T.astype(np.float64)  # (K, M)
        self.hit = self.is_class * (prob[self.rows].argmax(axis=1) == truth[self.rows].argmax(axis=1))

    def weighted(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy (B,), and recall of each class (K, B), NaN where the class has no weight."""
        mine = weights[self.rows]
        of_class, hits = self.is_class @ mine, self.hit @ mine
        with np.errstate(divide="ignore", invalid="ignore"):
            return hits.sum(axis=0) / of_class.sum(axis=0), hits / of_class


def classes_of(truth: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and most probable class of single-label images whose class is known: two (M,) arrays."""
    known = (truth == 1).any(axis=1)
    return truth[known].argmax(axis=1), prob[known].argmax(axis=1)


def _cumulative(weights: np.ndarray) -> np.ndarray:
    """(n, B) -> (n + 1, B): row k is the weight of the first k."""
    total = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=total[1:])
    return total


def _at_least(falling: np.ndarray, score: np.ndarray | float) -> np.ndarray:
    return len(falling) - np.searchsorted(falling[::-1], score, side="left")


def _above(falling: np.ndarray, score: np.ndarray | float) -> np.ndarray:
    return len(falling) - np.searchsorted(falling[::-1], score, side="right")


def _stretch(falling_bins: np.ndarray, k: int) -> slice:
    return slice(int(_above(falling_bins, k)), int(_at_least(falling_bins, k)))


def metrics_of(kind: str) -> Sequence[str]:
    """Metrics of one finding in `single` or `multi` data."""
    return FINDING_METRICS + MULTI_METRICS if kind == "multi" else FINDING_METRICS
