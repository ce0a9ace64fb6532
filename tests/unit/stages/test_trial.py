"""What a trial leaves on its GPU for the next one in the same process."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raysynth.core.errors import EnvironmentFault
from raysynth.stages import classifier_trial, trial


class Exit(BaseException):
    """The process ended."""


class Batch:
    """Stands for tensors of a trial."""


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Tune is told by a trial whose process has used CUDA."""
    from ray import tune

    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", rows.append)
    monkeypatch.setattr(trial, "_alone", lambda task: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return rows


def train(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(classifier_trial, "run_trial", run)
    trial.train_arm({"trial": 0}, [SimpleNamespace(gpu=True)])  # type: ignore[list-item]


def test_a_failed_trial_leaves_no_memory_behind(
    monkeypatch: pytest.MonkeyPatch, reported: list[dict[str, Any]]
) -> None:
    batches: list[weakref.ref] = []
    alive: list[bool] = []

    def fails(*_: object) -> None:
        batch = Batch()
        batch.itself = batch  # type: ignore[attr-defined]
        batches.append(weakref.ref(batch))
        raise EnvironmentFault("training takes more memory than there is")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(batches[0]() is not None))
    train(monkeypatch, fails)
    assert alive == [False]
    assert reported == [{"ending": {"reason": "training takes more memory than there is", "environment": True}}]


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_whose_cuda_is_broken_trains_nothing_more(
    monkeypatch: pytest.MonkeyPatch, reported: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    def run(*_: object) -> None:
        if fails:
            raise RuntimeError("device-side assert triggered in the loss")

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def ends(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(trial.os, "_exit", ends)
    with pytest.raises(Exit, match="1"):
        train(monkeypatch, run)
    assert reported == [], "Tune restarts a trial that died, but not one that has ended"
    said = capsys.readouterr().err
    assert "illegal memory access" in said
    assert ("in the loss" in said) == fails


def test_without_a_gpu_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch, reported: list[dict[str, Any]]) -> None:
    def never() -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", never)
    monkeypatch.setattr(torch.cuda, "empty_cache", never)
    train(monkeypatch, lambda *_: None)
    assert reported == [{"ending": {"reason": "", "environment": False}}]
