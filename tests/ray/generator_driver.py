"""A driver process that trains a small generator: `python -m tests.ray.generator_driver ROOT CACHE WORKERS`."""

from __future__ import annotations

import sys
from typing import Any

from raysynth.cli import guarded
from raysynth.core.config import build_experiment
from raysynth.core.experiment import Experiment
from raysynth.core.storage import open_storage


def small_experiment(root: str, cache: str, **compute: Any) -> Experiment:
    """150 steps with checkpoints every 25; `compute` may say otherwise where it does not change the weights."""
    return build_experiment({
        "name": "d", "root": root,
        "data": {
            "kind": "digits", "image": {"size": 8, "channels": "grey"}, "columns": {"attributes": {"sex": "sex"}},
            "labels": {"policy": {"0": "zeros"}},
        },
        "generator": {
            "train_on": "train", "base_channels": 8, "channel_multipliers": [1, 2], "steps": 150, "batch_size": 16,
            "conditions": ["label", "sex"], "warmup_steps": 5,
        },
        "compute": {
            "train_threads": 1, "train_workers": 1, "cache": cache, "address": "local", "checkpoint_every": 25,
            "sample_every": 75, **compute,
        },
    })  # fmt: skip


def main() -> None:
    """Connects to a private Ray and trains, or goes on training."""
    from raysynth.stages import cluster
    from raysynth.stages.train_generator import train_generator
    from tests.digits import digit_artifact

    experiment = small_experiment(sys.argv[1], sys.argv[2], train_workers=int(sys.argv[3]))
    storage = open_storage(experiment.root)
    cluster.connect(experiment.compute)
    train_generator(experiment, storage, digit_artifact(storage))


if __name__ == "__main__":
    guarded(main)
