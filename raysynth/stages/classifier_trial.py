"""One classifier from its task to its artifact: trained by this process or by several, then committed.

Runs where the device is: under Tune in a sweep, as a Ray task alone. What is complete is not trained again.
"""

from __future__ import annotations

import json
from typing import Any

from raysynth.core.identity import sha256_bytes
from raysynth.stages.classifier_loop import HISTORY, MODEL, Loop
from raysynth.stages.classifier_task import ClassifierTask, Report, gpus_held
from raysynth.stages.training_loop import threads


def run_trial(task: ClassifierTask, report: Report) -> dict[str, Any]:
    """Trains (from its checkpoint if there is one), exports and commits the artifact; runs where the device is.

    Args:
        report: called with {"step", "steps", "phase", "loss", "monitor", "value"} at every validation.

    Returns:
        {"best_step", "value"}: the checkpoint that was kept and the monitored metric there.

    Raises:
        ConfigError: the loss stopped being finite.
        MemoryFault: it takes more memory than the device has.
    """
    if task.artifact.complete:
        return _result(task)
    workers = task.compute.classifier_workers or 1
    if workers > 1:
        from raysynth.stages.classifier_ddp import fit

        fit(task, workers, report)
    else:
        with threads(max(1, int(task.compute.trial_cpus)) if not task.gpu else 1):
            Loop(task, report, "cuda" if task.gpu else "cpu").run()
    return commit(task)


def commit(task: ClassifierTask) -> dict[str, Any]:
    """Registers what training left, writes run.json and `_SUCCESS`, deletes the checkpoints."""
    artifact, storage = task.artifact, task.storage
    files = ["members.parquet", "validation.parquet"]
    files += [e.path.removeprefix(artifact.path + "/") for e in storage.list(artifact.file(MODEL))]
    for name in files:
        artifact.register(name, sha256_bytes(storage.get(artifact.file(name))))
    history = _history(task)
    best = [row for row in history if row["best"]][-1]
    seconds = round(history[-1].get("trained_seconds", 0.0), 3)
    artifact.commit(
        {**task.counts, "steps": history[-1]["step"]}, gpu_seconds=seconds * gpus_held(task.compute, task.gpu),
        **task.origin, facts=task.facts, best_step=best["step"], monitor=best["monitor"], value=best["value"],
        train_seconds=seconds, views=sorted(task.views.values()),
    )  # fmt: skip
    for entry in storage.list(artifact.file("checkpoints")):
        storage.delete(entry.path)
    return {"best_step": best["step"], "value": best["value"]}


def _history(task: ClassifierTask) -> list[dict[str, Any]]:
    return [json.loads(row) for row in task.storage.get(task.artifact.file(HISTORY)).decode().splitlines()]


def _result(task: ClassifierTask) -> dict[str, Any]:
    run = task.artifact.run_info()
    return {"best_step": run["best_step"], "value": run["value"]}
