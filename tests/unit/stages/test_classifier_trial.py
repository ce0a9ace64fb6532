"""Around a classifier's loop: what it costs, and what is heard of it while several processes train it."""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import ConfigError
from raysynth.core.experiment import Compute
from raysynth.core.storage import open_storage
from raysynth.stages.classifier_ddp import reporting
from raysynth.stages.classifier_loop import HISTORY
from raysynth.stages.classifier_trial import commit


@pytest.mark.parametrize(("settings", "gpu", "gpu_seconds"), [
    ({"classifier_workers": 4}, True, 400), ({"classifier_workers": 4, "trial_gpus": 0.5}, True, 400),
    ({"trial_gpus": 0.5}, True, 50), ({"classifier_workers": 4}, False, 0),
])  # fmt: skip
def test_every_process_of_a_classifier_holds_its_gpu(
    settings: dict[str, Any], gpu: bool, gpu_seconds: float, tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path))
    artifact = Artifact.at(storage, "train-classifier", "x", 1, {}, {})
    for name in ("members.parquet", "validation.parquet", "model/weights"):
        storage.put(artifact.file(name), b"x")
    row = {"best": True, "step": 60, "monitor": "auroc", "value": 0.9, "trained_seconds": 100.0}
    storage.put(artifact.file(HISTORY), json.dumps(row).encode())
    task: Any = SimpleNamespace(
        artifact=artifact, storage=storage, counts={}, compute=Compute(**settings), gpu=gpu, origin={}, facts={},
        views={"real": "view/a", "validation": "view/b"},
    )  # fmt: skip
    commit(task)
    run = artifact.run_info()
    assert (run["gpu_seconds"], run["views"]) == (gpu_seconds, ["view/a", "view/b"])


class Rows(queue.Queue):
    """A Ray queue's way to be emptied."""

    def get_nowait_batch(self, n: int) -> list[Any]:
        return [self.get_nowait() for _ in range(n)]


def test_a_validation_is_reported_while_the_processes_still_train() -> None:
    rows, heard, threads = Rows(), threading.Event(), []

    def work() -> None:
        rows.put({"step": 30})
        assert heard.wait(20), "nobody was told before the end"
        rows.put({"step": 60})

    steps = []

    def report(row: dict[str, Any]) -> None:
        steps.append(row["step"])
        threads.append(threading.current_thread())
        heard.set()

    reporting(work, rows, report)
    assert steps == [30, 60]
    assert set(threads) == {threading.current_thread()}


def test_what_came_before_an_error_is_reported_and_the_error_is_raised() -> None:
    rows, steps = Rows(), []

    def work() -> None:
        rows.put({"step": 30})
        raise ConfigError("classifier.lr", 9, "lower")

    with pytest.raises(ConfigError, match=r"classifier\.lr"):
        reporting(work, rows, lambda row: steps.append(row["step"]))
    assert steps == [30]
