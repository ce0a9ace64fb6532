"""What a process that trains a classifier is given, what it takes of the cluster, and what it calls meanwhile."""

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


def process_resources(compute: Compute, gpu: bool) -> dict[str, float]:
    """What one training process takes, in Ray's words; of several each has a GPU of its own."""
    gpus = 1.0 if (compute.classifier_workers or 1) > 1 else compute.trial_gpus
    return {"CPU": compute.trial_cpus} | ({"GPU": gpus} if gpu else {})


def gpus_held(compute: Compute, gpu: bool) -> float:
    """GPUs that all processes of one classifier hold while it trains."""
    return (compute.classifier_workers or 1) * process_resources(compute, gpu).get("GPU", 0.0)
