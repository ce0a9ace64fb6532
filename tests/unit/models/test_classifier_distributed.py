"""Two real processes train the classifier as one does on the global batch, batch norm's statistics included."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raysynth.core.evidence import Pretrain
from raysynth.models.classifier import ClassifierTraining
from tests.classifiers import BATCH, findings, tensors, tiny
from tests.ports import free_port

STEPS = 3
SETTINGS: dict[str, Any] = {
    "mixup": 0.4, "cutmix": 1.0, "mix_probability": 0.8, "augmentation": "heavy", "dropout": 0.3, "ema_decay": 0.9,
    "label_smoothing": 0.1, "head": [6],
}  # fmt: skip


def run(rank: int, world: int, settings: dict[str, Any], fine_tunes: bool) -> dict[str, torch.Tensor]:
    training = ClassifierTraining(
        tiny(**settings), 3, 1, "multi", "skin", class_weights=np.array([1.0, 2.0, 0.5])
    )
    training.network.double()
    if training.ema is not None:
        training.ema.double()
    if world > 1:
        training.distribute()
    training.begin(0, STEPS)
    mine = np.arange(BATCH).reshape(world, -1)[rank]
    losses = []
    for step in range(STEPS):
        if fine_tunes and step == 2:
            training.begin(1, STEPS, Pretrain(freeze="backbone", head="reset"))
        images, labels = findings(step)
        losses.append(training.update(images[mine], labels[mine], mine))
    return {**tensors(training), "losses": torch.stack(losses)}


def one_rank(rank: int, port: int, settings: dict[str, Any], fine_tunes: bool, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(run(rank, 2, settings, fine_tunes), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("changes", "fine_tunes"), [
    ({}, True),
    # timm's batch norm with an activation in it
    ({"architecture": "test_efficientnet", "arguments": {}}, False),
])  # fmt: skip
def test_two_ranks_train_as_one_process(tmp_path: Path, changes: dict[str, Any], fine_tunes: bool) -> None:
    port = free_port()
    settings = {**SETTINGS, **changes}
    # Forked: a fresh interpreter would spend a quarter of a minute on imports.
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=one_rank, args=(r, port, settings, fine_tunes, str(tmp_path))) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    whole = run(0, 1, settings, fine_tunes)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
