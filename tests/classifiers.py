"""A tiny classifier on real digits, for tests of its training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raysynth.core.evidence import Classifier
from raysynth.models.classifier import ClassifierTraining
from tests.digits import digit_images

BATCH = 16


def tiny(**changes: Any) -> Classifier:
    """Resolved for 8 x 8 images."""
    settings: dict[str, Any] = {
        "architecture": "resnet18", "arguments": {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]},
        "size": 8, "batch_size": BATCH, "steps": 8, "warmup_steps": 2, "validate_every": 1, "lr": 0.01,
    }  # fmt: skip
    return Classifier(**{**settings, **changes})


def one_hot(labels: np.ndarray) -> np.ndarray:
    """(N,) digits -> (N, 10) float32."""
    return np.eye(10, dtype=np.float32)[labels]


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and one-hot labels of the global batch of a step."""
    images, labels = digit_images()
    here = slice(step * BATCH, (step + 1) * BATCH)
    return images[here], one_hot(labels[here])


def findings(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Images with three findings of the digit, about half of them unknown, and far more in the first half."""
    images, labels = batch(step)
    digit = labels.argmax(1)
    found = np.stack([digit % 2, digit >= 5, digit % 3 == 0], 1).astype(np.float32)
    unknown = np.random.default_rng(step).random(found.shape) < np.linspace(0.9, 0.1, BATCH)[:, None]
    return images, np.where(unknown, np.nan, found).astype(np.float32)


def tensors(training: ClassifierTraining) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name."""
    found = {f"network.{k}": v for k, v in training.network.state_dict().items()}
    if training.ema is not None:
        found |= {f"ema.{k}": v for k, v in training.ema.state_dict().items()}
    return found
