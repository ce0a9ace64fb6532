"""The loss against torch's own, and what unknown labels, mixing and smoothing do to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from raysynth.models.classifier_loss import Kind, loss_sums, soft_labels

LOGITS = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (6, 4)))
CLASSES = torch.tensor([0, 1, 2, 3, 1, 1])
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)


def mean(labels: torch.Tensor, kind: Kind, smoothing: float = 0.0, weights: torch.Tensor | None = None,
         kept: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    total, count = loss_sums(LOGITS, *soft_labels(labels, kind, smoothing, kept), kind, weights)
    return total / count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_softmax_is_torchs_cross_entropy(smoothing: float, weights: torch.Tensor | None) -> None:
    labels = functional.one_hot(CLASSES, 4).double()
    expected = functional.cross_entropy(LOGITS, labels, weight=weights, label_smoothing=smoothing)
    torch.testing.assert_close(mean(labels, "single", smoothing, weights), expected)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_findings_are_torchs_binary_cross_entropy_over_what_is_known(weights: torch.Tensor | None) -> None:
    labels = torch.from_numpy(np.random.default_rng(1).choice([0.0, 1.0, np.nan], (6, 4)))
    known = ~labels.isnan()
    each = functional.binary_cross_entropy_with_logits(
        LOGITS, labels.nan_to_num(), pos_weight=weights, reduction="none"
    )
    torch.testing.assert_close(mean(labels, "multi", 0.0, weights), each[known].mean())
    smooth = functional.binary_cross_entropy_with_logits(LOGITS[known], labels[known] * 0.9 + 0.05)
    torch.testing.assert_close(mean(labels, "multi", 0.1), smooth)


def test_mixed_labels_are_the_mixture_of_both_losses() -> None:
    labels = functional.one_hot(CLASSES, 4).double()
    kept = torch.tensor([0.7, 0.7, 0.4, 0.4, 1.0, 1.0], dtype=torch.float64)
    partner = CLASSES.view(-1, 2).flip(1).flatten()
    own, other = (functional.cross_entropy(LOGITS, c, reduction="none") for c in (CLASSES, partner))
    torch.testing.assert_close(mean(labels, "single", kept=kept), (kept * own + (1 - kept) * other).mean())


def test_mixing_with_an_unknown_label_loses_nothing_that_is_known() -> None:
    labels = torch.full((6, 4), np.nan, dtype=torch.float64)
    labels[0] = torch.tensor([1.0, 0, 1, 0])
    kept = torch.full((6,), 0.7, dtype=torch.float64)
    each = functional.binary_cross_entropy_with_logits(LOGITS[:2], labels[[0, 0]], reduction="none").sum(1)
    # The second image of the pair is 0.3 of the first one, and known as far as that.
    torch.testing.assert_close(mean(labels, "multi", kept=kept), (0.7 * each[0] + 0.3 * each[1]) / 4)


def test_gradients_are_finite_where_nothing_is_known() -> None:
    logits = LOGITS.clone().requires_grad_()
    labels = torch.full((6, 4), np.nan, dtype=torch.float64)
    for kind in ("single", "multi"):
        total, count = loss_sums(logits, *soft_labels(labels, kind), kind)  # type: ignore[arg-type]
        total.backward()
        assert float(count) == 0
        assert logits.grad is not None
        assert bool((logits.grad == 0).all())
