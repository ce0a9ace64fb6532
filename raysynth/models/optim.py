"""Optimizer, learning rate and moving average of the DDPM, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim.swa_utils import AveragedModel

from raysynth.core.experiment import Generator

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def make_optimizer(generator: Generator, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or Lion (Chen 2023, 2302.06675) as timm keeps it."""
    if generator.optimizer == "lion":
        from timm.optim import Lion

        return Lion(parameters, lr=generator.lr, weight_decay=generator.weight_decay)
    return torch.optim.AdamW(parameters, lr=generator.lr, weight_decay=generator.weight_decay)


def learning_rate(generator: Generator, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant or a half cosine to 0."""
    warm = min(1.0, (step + 1) / max(1, generator.warmup_steps))
    if generator.lr_schedule == "constant" or step < generator.warmup_steps:
        return generator.lr * warm
    done = (step - generator.warmup_steps) / max(1, generator.steps - generator.warmup_steps)
    return generator.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def ema_decay(decay: float, step: int) -> float:
    """Decay after `step` updates, warmed up: min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1.0 + step) / (10.0 + step))


def make_ema(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model's weights; `.module` is the averaged model."""
    return AveragedModel(model, multi_avg_fn=_averaging(decay))


def _averaging(decay: float) -> Callable[[Tensors, Tensors, torch.Tensor | int], None]:
    @torch.no_grad()
    def average(kept: Tensors, new: Tensors, updates: torch.Tensor | int) -> None:
        torch._foreach_lerp_(kept, new, 1.0 - ema_decay(decay, int(updates)))

    return average
