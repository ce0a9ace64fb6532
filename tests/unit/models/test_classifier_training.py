"""The classifier's training: it learns, repeats itself, goes on from a saved state, and fine-tunes as told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from raysynth.core.evidence import Pretrain
from raysynth.data.views import ShuffledOrder
from raysynth.models.classifier import ClassifierTraining
from tests.classifiers import BATCH, batch, findings, one_hot, tensors, tiny
from tests.digits import digit_images

PLACES = np.arange(BATCH)
EVERYTHING: dict[str, Any] = {
    "dropout": 0.3, "drop_path": 0.2, "mixup": 0.4, "cutmix": 1.0, "augmentation": "heavy", "label_smoothing": 0.1,
    "ema_decay": 0.9, "head": [6],
}  # fmt: skip


def start(seed: int = 0, **changes: Any) -> ClassifierTraining:
    return ClassifierTraining(tiny(seed=seed, **changes), 10, 1, "single", "general")


def same(a: ClassifierTraining, b: ClassifierTraining) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_it_learns_to_read_digits() -> None:
    images, labels = digit_images()
    training = ClassifierTraining(
        tiny(steps=120, batch_size=64, arguments={"channels": [16, 32, 32, 32], "layers": [1, 1, 1, 1]}),
        10, 1, "single", "general",
    )  # fmt: skip
    training.begin(0, 120)
    order = ShuffledOrder(1000, 0, 64)
    for step in range(120):
        here = order.batch(step)
        training.update(images[here], one_hot(labels[here]), np.arange(64))
    probabilities = training.predict(images[1000:])
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    # Untrained 0.1.
    assert (probabilities.argmax(1) == labels[1000:]).mean() > 0.85


def test_findings_are_learnt_from_partly_unknown_labels() -> None:
    images, labels = digit_images()
    found = np.stack([labels % 2, labels >= 5], 1).astype(np.float32)
    known = np.where(np.random.default_rng(0).random(found.shape) < 0.5, np.nan, found).astype(np.float32)
    training = ClassifierTraining(
        tiny(steps=60, batch_size=64, arguments={"channels": [16, 16, 32, 32], "layers": [1, 1, 1, 1]}),
        2, 1, "multi", "general", class_weights=np.array([1.0, 2.0]),
    )  # fmt: skip
    training.begin(0, 60)
    order = ShuffledOrder(1000, 0, 64)
    for step in range(60):
        training.update(images[order.batch(step)], known[order.batch(step)], np.arange(64))
    assert roc_auc_score(found[1000:], training.predict(images[1000:])) > 0.8


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_a_saved_run_goes_on_to_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    settings = {**EVERYTHING, "optimizer": optimizer, "momentum": 0.9}
    whole, first, second = (start(**settings) for _ in range(3))
    whole.begin(0, 4)
    first.begin(0, 4)
    for step in range(4):
        whole.update(*batch(step), PLACES)
    for step in range(2):
        first.update(*batch(step), PLACES)
    first.save(str(tmp_path / "state.pt"))
    torch.manual_seed(77)  # nothing may depend on the global stream
    second.load(str(tmp_path / "state.pt"))
    for step in range(2, 4):
        second.update(*batch(step), PLACES)
    assert second.step == second.phase_step == 4
    assert same(whole, second)


@pytest.mark.parametrize("pretrain", [
    Pretrain(head="reset", lr=0.003), Pretrain(reset_optimizer=False, reset_ema=False), Pretrain(freeze="backbone"),
    Pretrain(head="reset", reset_optimizer=False, reset_ema=False),
])  # fmt: skip
def test_a_run_of_two_phases_goes_on_from_either(tmp_path: Path, pretrain: Pretrain) -> None:
    def run(training: ClassifierTraining, until: int) -> None:
        while training.step < until:
            if training.step == 2 and training.phase == 0:
                training.begin(1, 3, pretrain)
            training.update(*batch(training.step), PLACES)

    whole = start(**EVERYTHING)
    whole.begin(0, 2, pretrain)
    run(whole, 5)
    for killed_after in (1, 2, 4):
        first, second = start(**EVERYTHING), start(**EVERYTHING)
        first.begin(0, 2, pretrain)
        run(first, killed_after)
        first.save(str(tmp_path / "state.pt"))
        second.load(str(tmp_path / "state.pt"))
        run(second, 5)
        assert (second.phase, second.phase_step) == (1, 3)
        assert same(whole, second), killed_after


def pretrained(pretrain: Pretrain, **changes: Any) -> tuple[ClassifierTraining, dict[str, torch.Tensor]]:
    """At the start of fine-tuning, with its tensors of just before."""
    training = start(**changes)
    training.begin(0, 3, pretrain)
    for step in range(3):
        training.update(*batch(step), PLACES)
    before = {k: v.clone() for k, v in tensors(training).items()}
    training.begin(1, 3, pretrain)
    return training, before


def test_head_and_optimizer_and_average_are_kept_or_reset() -> None:
    training, before = pretrained(Pretrain(head="keep", reset_optimizer=False, reset_ema=False), ema_decay=0.9)
    assert all(torch.equal(v, before[k]) for k, v in tensors(training).items())
    assert training.optimizer.state
    training, before = pretrained(Pretrain(head="reset", reset_optimizer=True, reset_ema=True), ema_decay=0.9)
    assert not training.optimizer.state
    for name, value in training.network.state_dict().items():
        moved = not torch.equal(value, before[f"network.{name}"])
        assert moved == name.startswith("head."), name
        assert torch.equal(training.best.state_dict()[name], value)
    assert training.ema is not None
    assert int(training.ema.n_averaged) == 0


def test_learning_rate_of_both_phases() -> None:
    def rates(pretrain: Pretrain) -> list[float]:
        training, found = start(lr=1.0, warmup_steps=2, steps=8), []
        for phase in range(2):
            training.begin(phase, 4, pretrain)
            for _ in range(4):
                training.update(*batch(0), PLACES)
                found.append(training.optimizer.param_groups[0]["lr"])
        return found

    cosine = [0.5, 1.0, 1.0, 0.5]
    np.testing.assert_allclose(rates(Pretrain(lr=0.1)), [*cosine, *(0.1 * r for r in cosine)])
    through = [0.5, 1.0, *(0.5 * (1 + np.cos(np.pi * i / 6)) for i in range(6))]
    np.testing.assert_allclose(rates(Pretrain(reset_optimizer=False)), through)


def test_a_frozen_backbone_keeps_weights_and_statistics() -> None:
    training, before = pretrained(Pretrain(freeze="backbone"), ema_decay=0.9)
    for step in range(3):
        training.update(*batch(step), PLACES)
    for name, value in training.network.state_dict().items():
        assert torch.equal(value, before[f"network.{name}"]) == (not name.startswith("head.")), name


def test_a_run_depends_on_its_seed_alone() -> None:
    runs = [start(seed, **EVERYTHING) for seed in (0, 0, 1)]
    for training in runs:
        training.begin(0, 2)
        torch.manual_seed(runs.index(training))
        for step in range(2):
            training.update(*batch(step), PLACES)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_predictions_are_of_the_moving_average_in_eval_mode() -> None:
    training = start(ema_decay=0.5, augmentation="heavy", dropout=0.5)
    training.begin(0, 6)
    for step in range(6):
        training.update(*batch(step), PLACES)
    images = batch(9)[0]
    one = training.predict(images)
    np.testing.assert_allclose(training.predict(images, batch_size=3), one, atol=1e-6)
    assert training.predict(images[:0]).shape == (0, 10)
    training.update(*batch(6), PLACES)
    assert training.network.training
    average, training.ema = training.ema, None
    assert not np.allclose(training.predict(images), one)
    assert average is not None
    # Its batch norm has the averaged statistics, as its weights are averaged.
    name = "backbone.bn1.running_mean"
    assert not torch.equal(average.module.state_dict()[name], training.network.state_dict()[name])


def test_a_batch_of_unknown_labels_changes_nothing_but_decay() -> None:
    training = ClassifierTraining(tiny(weight_decay=0.0, optimizer="sgd"), 3, 1, "multi", "general")
    training.begin(0, 2)
    before = [p.clone() for p in training.network.parameters()]
    loss = training.update(findings(0)[0], np.full((BATCH, 3), np.nan, np.float32), PLACES)
    assert float(loss) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, training.network.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_computes_in_half_and_keeps_float32_weights(
    dtype: torch.dtype, tmp_path: Path, own_kernels: None
) -> None:
    """What a GPU is told to do at that precision, done by the CPU, which trains in float32 unless made to."""
    half, resumed, full = (start() for _ in range(3))
    for training in (half, resumed):
        training.half = dtype
        training.scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    for training in (half, resumed, full):
        training.begin(0, 4)
    seen: set[torch.dtype] = set()
    half.network.head[-1].register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    for step in range(3):
        assert float(half.update(*batch(step), PLACES)) == pytest.approx(
            float(full.update(*batch(step), PLACES)), rel=5e-2)  # fmt: skip
    assert seen == {dtype}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half.network.parameters())
    half.save(str(tmp_path / "state.pt"))
    resumed.load(str(tmp_path / "state.pt"))
    for training in (half, resumed):
        training.update(*batch(3), PLACES)
    assert same(half, resumed)
    # Validation and test predictions are float32 whatever it was trained in.
    assert half.predict(batch(0)[0]).dtype == np.float32
