"""Optimizer, learning rate and moving average of what is trained here, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.optim.swa_utils import AveragedModel

from raysynth.core.evidence import Classifier
from raysynth.core.experiment import Generator


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


class MovingAverage(AveragedModel):
    """torch's, whose own update copies its counter to the device and so waits for a GPU at every step.

    The first update copies; later ones average by `ema_decay`. Buffers that are not averaged are copied.
    """

    def __init__(self, model: torch.nn.Module, decay: float, buffers: bool) -> None:
        super().__init__(model, use_buffers=buffers)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """One step towards the weights of `model`."""
        updates = int(self.n_averaged)  # on the CPU
        averaged: list[tuple[torch.Tensor, torch.Tensor]] = []
        averaged.extend(zip(self.module.parameters(), model.parameters(), strict=True))
        copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        for kept, new in zip(self.module.buffers(), model.buffers(), strict=True):
            # Counters, such as the number of batches that batch norm has seen, have no average.
            (averaged if self.use_buffers and kept.is_floating_point() else copied).append((kept, new))
        if updates:
            kept_all, new_all = zip(*averaged, strict=True)
            torch._foreach_lerp_(kept_all, new_all, 1.0 - ema_decay(self.decay, updates))
        else:
            copied += averaged
        for kept, new in copied:
            kept.copy_(new)
        self.n_averaged += 1


def make_ema(model: torch.nn.Module, decay: float, buffers: bool = False) -> MovingAverage:
    """Exponential moving average of a model's weights; `.module` is the averaged model.

    Args:
        buffers: averages buffers as well (the statistics of batch norm, which belong to the weights); else copies.
    """
    return MovingAverage(model, decay, buffers)
