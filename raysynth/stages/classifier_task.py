"""What a process that trains a classifier is given, and what it calls while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raysynth.core.artifacts import Artifact
from raysynth.core.evidence import Classifier, Pretrain
from raysynth.core.experiment import Compute
from raysynth.core.storage import Storage

Report = Callable[[dict[str, Any]], Any]
"""What a trial calls at every validation: {"step", "steps", "phase", "loss", "monitor", "value"}."""


@dataclass(frozen=True)
class ClassifierTask:
    """Everything a trial needs; small, and picklable. It knows no test image."""

    artifact: Artifact
    classifier: Classifier
    """With its nulls resolved."""
    pretrain: Pretrain
    real_fraction: float | None
    phase_steps: list[int]
    views: dict[str, str]
    """`real`, `synthetic` and `validation` -> folder of the view, relative to the root."""
    classes: list[str]
    kind: str
    """single or multi."""
    policy: dict[str, str]
    modality: str
    """data.image.preset"""
    channels: int
    validation: list[str]
    """Image ids, of the view `validation`."""
    counts: dict[str, Any]
    """For run.json."""
    facts: dict[str, Any]
    """Of the experiment, for the metric table: strategy, ratio, seeds..."""
    compute: Compute
    gpu: bool
    origin: dict[str, Any]
    """Command and git state of the driver."""

    @property
    def storage(self) -> Storage:
        """Where the artifact and the views are."""
        return self.artifact.storage
