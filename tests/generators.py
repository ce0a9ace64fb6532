"""Small generators really trained for a few steps on digits, for tests of training, export and rendering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raysynth.core.experiment import Generator, ImageSpec
from raysynth.core.presets import resolve_generator
from raysynth.data.conditions import ConditionSpec
from raysynth.models.ddpm import DDPMTraining
from raysynth.models.export import export_generator
from tests.digits import CLASSES, digit_images

BATCH = 8
SPEC = ConditionSpec("single", CLASSES, list(CLASSES))
NULL = SPEC.null
FACTS = {"n_real_generator": 8, "train_on": "train", "channels": 1, "licence": "CC0", "images_digest": "d"}


def small(**keys: Any) -> Generator:
    """A resolved generator of 8 x 8 images with few channels."""
    keys = {"base_channels": 8, "channel_multipliers": [1, 2], "condition_dropout": 0.3, "warmup_steps": 1} | keys
    return resolve_generator(Generator(**keys), ImageSpec(size=8))


def batch(step: int, size: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    """The images (B, 8, 8, 1) uint8 and conditions (B, 12) of batch `step`."""
    images, labels = digit_images()
    here = slice(step * size, (step + 1) * size)
    return images[here], conditions(labels[here])


def conditions(labels: np.ndarray) -> np.ndarray:
    """Condition vectors of class numbers: (B, 12) float32."""
    return SPEC.encode({f"label_{c}": (labels == int(c)).astype(int).tolist() for c in CLASSES})


def exported(folder: Path) -> DDPMTraining:
    """A generator of three steps, and its export in `folder`."""
    training = DDPMTraining(small(), NULL, 1)
    for step in range(3):
        training.update(*batch(step), np.arange(BATCH))
    export_generator(folder, training.generator, training.ema.module, SPEC, FACTS)
    return training
