"""A driver process that runs a small sweep, to be killed: `python -m tests.ray.sweep_driver ROOT CACHE`."""

from __future__ import annotations

import sys
from typing import Any

from raysynth.core.config import build_experiment
from raysynth.core.experiment import Experiment

ARMS: dict[str, Any] = {
    "real": {"training_set.strategy": "real"},
    "x1": {"training_set.ratio": 1},
    "x2": {"training_set.ratio": 2},
    "x1 again": {"training_set.ratio": 1},
}


def small_sweep(root: str, cache: str, arms: dict[str, Any] = ARMS, **classifier: Any) -> Experiment:
    """30 real digits, a generator of ten steps, tiny classifiers of 60 steps."""
    return build_experiment({
        "name": "s", "root": root,
        "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "training_set": {"n_per_class": 3, "strategy": "mix"},
        "generator": {"base_channels": 8, "channel_multipliers": [1, 2], "steps": 10, "batch_size": 16},
        "plan": {"replicas": 2}, "sampling": {"steps": 2},
        "classifier": {
            "architecture": "test_resnet", "steps": 60, "batch_size": 16, "validate_every": 10, "warmup_steps": 2,
            **classifier,
        },
        "sweep": {"arms": arms},
        "compute": {
            "cache": cache, "address": "local", "train_workers": 0, "render_workers": 1, "micro_batch": 8,
            "shard_rows": 16,
        },
    })  # fmt: skip


def main() -> None:
    """Runs the sweep, or goes on with it."""
    from raysynth.stages.pipeline import Pipeline
    from raysynth.stages.sweep import sweep

    experiment = small_sweep(sys.argv[1], sys.argv[2])
    sweep(Pipeline(experiment), experiment)


if __name__ == "__main__":
    main()
