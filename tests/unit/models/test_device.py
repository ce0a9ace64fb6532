"""What is asked of a GPU's arithmetic, as far as a CPU can tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysynth.models import classifier, ddpm
from raysynth.models.classifier import ClassifierTraining
from raysynth.models.classifier_export import export_classifier, load_classifier
from raysynth.models.ddpm import DDPMTraining
from raysynth.models.device import deterministic, full_precision
from tests.classifiers import batch, tiny
from tests.generators import BATCH, NULL, small
from tests.generators import batch as generator_batch

CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """Puts the process's flags back."""
    before = CUDNN.deterministic, CUDNN.benchmark, CUDNN.allow_tf32, MATMUL.allow_tf32
    yield
    CUDNN.deterministic, CUDNN.benchmark, CUDNN.allow_tf32, MATMUL.allow_tf32 = before


def start(**changes: Any) -> ClassifierTraining:
    return ClassifierTraining(tiny(**changes), 10, 1, "single", "general")


def test_convolutions_repeat_their_bits_on_a_gpu() -> None:
    CUDNN.deterministic, CUDNN.benchmark = False, True
    deterministic(torch.device("cpu"))
    assert (CUDNN.deterministic, CUDNN.benchmark) == (False, True)
    deterministic(torch.device("cuda:0"))
    assert (CUDNN.deterministic, CUDNN.benchmark) == (True, False)


def test_both_trainings_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    for module in (classifier, ddpm):
        monkeypatch.setattr(module, "deterministic", asked.append)
    start()
    DDPMTraining(small(), NULL, 1)
    assert asked == [torch.device("cpu")] * 2


def test_full_precision_puts_back_what_training_uses() -> None:
    CUDNN.allow_tf32, MATMUL.allow_tf32 = True, True
    with full_precision():
        assert (CUDNN.allow_tf32, MATMUL.allow_tf32) == (False, False)
    assert (CUDNN.allow_tf32, MATMUL.allow_tf32) == (True, True)


def test_validation_is_predicted_as_test_images_are(tmp_path: Path) -> None:
    training, images = start(), batch(0)[0]
    training.half = torch.bfloat16
    export_classifier(tmp_path, training, {})
    assert training.predict(images).tobytes() == load_classifier(tmp_path).predict(images).tobytes()


def test_no_prediction_is_rounded_to_tf32() -> None:
    training, seen = start(), []
    CUDNN.allow_tf32 = True
    training.best.register_forward_hook(lambda *_: seen.append(CUDNN.allow_tf32))
    training.predict(batch(0)[0])
    assert seen == [False]
    assert CUDNN.allow_tf32


@pytest.mark.filterwarnings("ignore:.*which is a no-op")
def test_a_generator_that_goes_on_counts_its_steps_on_the_cpu(tmp_path: Path) -> None:
    training = DDPMTraining(small(optimizer="adamw"), NULL, 1)
    training.update(*generator_batch(0), np.arange(BATCH))
    training.save(str(tmp_path / "state.pt"))
    resumed = DDPMTraining(small(optimizer="adamw"), NULL, 1, "meta")  # a device that is not the CPU
    resumed.load(str(tmp_path / "state.pt"))
    states = list(resumed.optimizer.state.values())
    assert {state["exp_avg"].device.type for state in states} == {"meta"}
    assert {state["step"].device.type for state in states} == {"cpu"}
