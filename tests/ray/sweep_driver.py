"""A driver process that runs a small sweep and dies in it: `python -m tests.ray.sweep_driver ROOT CACHE`."""

from __future__ import annotations

import os
import signal
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
    """Runs the sweep on one CPU, and dies at the first validation of a trial after another one has ended."""
    import ray

    from raysynth.stages.pipeline import Pipeline
    from raysynth.stages.sweep import sweep
    from raysynth.stages.sweep_table import SweepTable

    def reported(self: SweepTable, number: int, result: dict[str, Any]) -> None:
        # Ray Tune holds the trial until its driver has answered.
        if any(row.state == "done" for row in self.rows):
            os.kill(os.getpid(), signal.SIGKILL)

    SweepTable.reported = reported  # type: ignore[method-assign]
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
    experiment = small_sweep(sys.argv[1], sys.argv[2])
    sweep(Pipeline(experiment), experiment)


if __name__ == "__main__":
    main()
