"""Optimizer, learning rate and moving average of what is trained here, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim.swa_utils import AveragedModel

from raysynth.core.evidence import Classifier
from raysynth.core.experiment import Generator

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def make_optimizer(
    section: Generator | Classifier, parameters: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW; Lion (Chen 2023, 2302.06675) as timm keeps it; or SGD with Nesterov momentum."""
    if section.optimizer == "lion":
        from timm.optim import Lion

        return Lion(parameters, lr=section.lr, weight_decay=section.weight_decay)
    if isinstance(section, Classifier) and section.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=section.lr, weight_decay=section.weight_decay, momentum=section.momentum,
            nesterov=section.momentum > 0,
        )  # fmt: skip
    # One fused kernel is six times as fast on a CPU, a seventh of a small classifier's step; its rounding is its own,
    # so that generators stay with the plain one.
    fused = isinstance(section, Classifier) or None
    return torch.optim.AdamW(parameters, lr=section.lr, weight_decay=section.weight_decay, fused=fused)


def learning_rate(
    section: Generator | Classifier, step: int, steps: int | None = None, lr: float | None = None
) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant or a half cosine to 0.

    Args:
        section: says the schedule.
        steps: length of the schedule; None: `section.steps`.
        lr: its highest value; None: `section.lr`.
    """
    steps, lr = section.steps if steps is None else steps, section.lr if lr is None else lr
    warm = min(1.0, (step + 1) / max(1, section.warmup_steps))
    if section.lr_schedule == "constant" or step < section.warmup_steps:
        return lr * warm
    done = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    return lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def ema_decay(decay: float, step: int) -> float:
    """Decay after `step` updates, warmed up: min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1.0 + step) / (10.0 + step))


def make_ema(model: torch.nn.Module, decay: float, buffers: bool = False) -> AveragedModel:
    """Exponential moving average of a model's weights; `.module` is the averaged model.

    Args:
        buffers: averages buffers as well (the statistics of batch norm, which belong to the weights); else copies.
    """
    return AveragedModel(model, multi_avg_fn=_averaging(decay), use_buffers=buffers)


def _averaging(decay: float) -> Callable[[Tensors, Tensors, torch.Tensor | int], None]:
    @torch.no_grad()
    def average(kept: Tensors, new: Tensors, updates: torch.Tensor | int) -> None:
        if kept[0].is_floating_point():
            torch._foreach_lerp_(kept, new, 1.0 - ema_decay(decay, int(updates)))
        else:  # counters, such as the number of batches that batch norm has seen
            torch._foreach_copy_(kept, new)

    return average
