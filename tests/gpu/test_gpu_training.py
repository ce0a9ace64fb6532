"""Training's arithmetic and memory on a real GPU; skipped, saying so, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysynth.core.errors import EnvironmentFault
from raysynth.models.classifier import ClassifierTraining
from raysynth.models.classifier_export import export_classifier, load_classifier
from raysynth.models.ddpm import DDPMTraining
from raysynth.models.optim import make_ema
from raysynth.stages.training_loop import enough_memory
from raysynth.stages.trial import Ending, leave_device
from tests.classifiers import BATCH, batch, tensors, tiny
from tests.generators import BATCH as GENERATOR_BATCH
from tests.generators import NULL, small
from tests.generators import batch as generator_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


def trained(steps: int = 3, **changes: Any) -> ClassifierTraining:
    training = ClassifierTraining(tiny(**changes), 10, 1, "single", "general", device="cuda")
    training.begin(0, 8)
    for step in range(steps):
        training.update(*batch(step), np.arange(BATCH))
    return training


def test_the_moving_average_never_waits() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).cuda()
    ema = make_ema(model, 0.5, buffers=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            ema.update_parameters(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_generator_that_goes_on_counts_its_steps_on_the_cpu(tmp_path: Path) -> None:
    training, resumed = (DDPMTraining(small(optimizer="adamw"), NULL, 1, "cuda") for _ in range(2))
    training.update(*generator_batch(0), np.arange(GENERATOR_BATCH))
    training.save(str(tmp_path / "state.pt"))
    resumed.load(str(tmp_path / "state.pt"))
    assert {state["step"].device.type for state in resumed.optimizer.state.values()} == {"cpu"}
    assert {state["exp_avg"].device.type for state in resumed.optimizer.state.values()} == {"cuda"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_validation_is_predicted_as_test_images_are(precision: Any, tmp_path: Path) -> None:
    training, images = trained(precision=precision), batch(0)[0]
    export_classifier(tmp_path, training, {})
    assert training.predict(images).tobytes() == load_classifier(tmp_path, "cuda").predict(images).tobytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_classifier_trained_twice_is_the_same_within_rounding(precision: Any) -> None:
    first, second = tensors(trained(precision=precision)), tensors(trained(precision=precision))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_memory_is_short_in_words_and_then_free_again() -> None:
    with pytest.raises(EnvironmentFault, match=r"more memory than there is .*Try less"), enough_memory("Try less."):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    kept = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del kept
    before = torch.cuda.memory_reserved()
    leave_device(Ending())
    assert torch.cuda.memory_reserved() <= before - 2**28
