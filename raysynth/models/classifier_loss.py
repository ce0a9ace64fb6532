"""The classifier's loss over labels that may be soft, weighted and partly unknown, as sums that ranks can add.

Every entry of the labels carries two numbers: how much of it is known, K, and how much of that is positive, P. Unmixed
and known they are 1 and y, unknown 0 and 0; mixup and CutMix mix both, so that an unknown label of one image takes
nothing from what is known of the other. With logits x:

    multi:   sum w P softplus(-x) + (K - P) softplus(x) over findings, by the count sum K     (masked BCE)
    single:  sum -w P log softmax(x) over classes, by the count of images, sum K

Knows nothing of networks or processes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import log_softmax, softplus

Kind = Literal["single", "multi"]


def soft_labels(
    labels: torch.Tensor, kind: Kind, smoothing: float = 0.0, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is positive and what is known.

    Args:
        labels: (B, L) float, NaN = unknown; of kind single, one of them is 1.
        smoothing: share given to all classes alike (single), or to both answers (multi).
        kept: (B,) share of an image's own labels where images are mixed in pairs side by side.

    Returns:
        P (B, L) float; K (B, L) float of kind multi, (B, 1) of kind single.
    """
    known = ~labels.isnan()
    if kind == "single":
        known = known.all(1, keepdim=True)
    level = 1 / labels.shape[1] if kind == "single" else 0.5
    positive = torch.where(known, labels.nan_to_num() * (1 - smoothing) + smoothing * level, 0.0)
    weight = known.to(labels.dtype)
    if kept is None:
        return positive, weight
    return _paired(positive, kept), _paired(weight, kept)


def _paired(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    other = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.lerp(other, values, kept[:, None])


def loss_sums(
    logits: torch.Tensor, positive: torch.Tensor, known: torch.Tensor, kind: Kind, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the loss over what is known, and the count it is to be divided by.

    Args:
        logits: (B, L). positive, known: of `soft_labels`.
        weights: (L,) of each class (single), or of each finding's positives (multi).
    """
    weighted = positive if weights is None else positive * weights
    if kind == "single":
        return -(weighted * log_softmax(logits, 1)).sum(), known.sum()
    return (weighted * softplus(-logits) + (known - positive) * softplus(logits)).sum(), known.sum()
