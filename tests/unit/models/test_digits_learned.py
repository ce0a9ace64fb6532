"""A generator trained for seconds on real digits draws the digit it is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.svm import SVC

from raysynth.core.experiment import Sampling
from raysynth.data.views import BalancedOrder
from raysynth.models.ddpm import DDPMTraining
from raysynth.models.export import export_generator
from raysynth.synth.ddpm import DDPMRenderer
from raysynth.synth.renderer import Row, to_uint8
from tests.digits import CLASSES, digit_images
from tests.generators import FACTS, NULL, SPEC, conditions, small

BATCH, WANTED = 64, 200


def test_a_classifier_of_real_digits_reads_the_digits_asked_for(tmp_path: Path) -> None:
    images, labels = digit_images()
    judge = SVC(C=10).fit(images[::2].reshape(-1, 64), labels[::2])
    assert judge.score(images[1::2].reshape(-1, 64), labels[1::2]) > 0.98
    generator = small(
        base_channels=16, channel_multipliers=[1, 2, 2], condition_dropout=0.1, batch_size=BATCH, steps=400, lr=2e-3,
        warmup_steps=20, ema_decay=0.98,
    )  # fmt: skip
    training = DDPMTraining(generator, NULL, 1)
    told = conditions(labels)
    order = BalancedOrder([np.flatnonzero(labels == int(c)) for c in CLASSES], 0, BATCH)
    for step in range(generator.steps):
        batch = order.batch(step)
        training.update(images[batch], told[batch], np.arange(BATCH))
    export_generator(tmp_path, generator, training.ema.module, SPEC, FACTS)
    wanted = np.arange(WANTED) % 10
    rows = [Row(str(i), i, {f"label_{c}": int(c == str(k)) for c in CLASSES}) for i, k in enumerate(wanted)]
    drawn = DDPMRenderer(str(tmp_path), Sampling(steps=15)).render(rows, WANTED)
    read = judge.predict(np.stack([to_uint8(image) for image in drawn]).reshape(-1, 64))
    # .94 measured; untrained 0.1. Lower would mean that condition, schedule or export lost the class.
    assert (read == wanted).mean() > 0.85
