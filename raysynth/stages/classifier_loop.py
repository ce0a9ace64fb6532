"""What a classifier's training process runs: batches, steps, validation on real images, the best checkpoint, export.

Batches and draws are pure functions of the step, so that a trial that was killed goes on from its last validation to
the same weights. With several processes rank 0 validates and writes; all compute.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raysynth.core.errors import require
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.data.feed import Feed
from raysynth.data.predictions import truth, with_probabilities
from raysynth.data.views import View
from raysynth.metrics.validation import validation_scores
from raysynth.stages.classifier_task import ClassifierTask, Report
from raysynth.stages.training_loop import enough_memory
from raysynth.stages.views import open_view_folder

STATE = "checkpoints/training.pt"
HISTORY = "log/history.jsonl"
EVENTS = "log/events.out.tfevents.0.raysynth"
MODEL = "model"
MEMORY_REMEDY = (
    "Lower classifier.batch_size in every arm, or raise compute.classifier_workers (processes that share the batch, a "
    "GPU each) or compute.trial_gpus (trials that share a GPU are then fewer)."
)


class Loop:
    """Steps of one process until the budget is spent or validation stops improving.

    Args:
        group: (rank, world size) of a data-parallel run, whose process group is initialized.
    """

    def __init__(
        self, task: ClassifierTask, report: Report, device: str, group: tuple[int, int] = (0, 1)
    ) -> None:
        from raysynth.models.classifier import ClassifierTraining

        self.task, self.report, self.device = task, report, device
        self.rank, self.world = group
        self.views = {n: open_view_folder(task.storage, v, task.compute.cache) for n, v in task.views.items()}
        self.members = from_parquet(task.storage.get(task.artifact.file("members.parquet")))
        self.feeds = [self._feed(phase) for phase in range(len(task.phase_steps))]
        self.training = ClassifierTraining(
            task.classifier, len(task.classes), task.channels, task.kind, task.modality, self._class_weights(), device
        )
        if self.world > 1:
            self.training.distribute()
        self.validation = validation_view(task, self.views["validation"])
        self.history: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def _feed(self, phase: int) -> Feed:
        t = self.task
        return Feed(
            self.members, phase, self.views, t.classes, t.classifier.batch_size, t.classifier.seed,
            t.classifier.sampler == "balanced", t.real_fraction if phase == 0 else None, t.policy,
        )  # fmt: skip

    def run(self) -> None:
        """Trains to the end and leaves the best checkpoint's model and predictions in the artifact's folder.

        Raises:
            ConfigError: the loss, or what is said of validation images, stopped being finite.
            MemoryFault: it takes more memory than the device has.
        """
        with enough_memory(MEMORY_REMEDY):
            self._run()

    def _run(self) -> None:
        t, training = self.task, self.training
        self._resume()
        share = t.classifier.batch_size // self.world
        mine = np.arange(self.rank * share, (self.rank + 1) * share)
        ends = np.cumsum(t.phase_steps).tolist()
        every = t.classifier.validate_every or t.classifier.steps
        losses: Any = 0.0
        since = 0
        while training.step < ends[-1] and not self._stopped():
            phase = next(i for i, end in enumerate(ends) if training.step < end)
            begun = ends[phase] - t.phase_steps[phase]
            if training.step == begun:
                training.begin(phase, t.phase_steps[phase], t.pretrain if len(ends) > 1 else None)
            batch = self.feeds[phase].batch(training.step - begun, mine)
            losses = losses + training.update(batch.images, batch.labels, mine)
            since += 1
            if training.step in ends or training.step % every == 0:
                self._validate(phase, float(losses) / since)
                losses, since = 0.0, 0

    def _class_weights(self) -> np.ndarray | None:
        """Of the last stage's members: n / (classes n_class) of each class, negatives / positives of each finding."""
        if self.task.classifier.class_weights == "none":
            return None
        positive, negative = self.feeds[-1].class_counts().astype(np.float32)
        least = np.maximum(positive, 1)
        return negative / least if self.task.kind == "multi" else positive.sum() / (len(positive) * least)

    def _require_finite(self, what: str, finite: bool) -> None:
        require(
            finite, "classifier.lr", self.task.classifier.lr,
            f"lower: {what} not finite by step {self.training.step}",
            "Try a third of it, or more classifier.warmup_steps.",
        )  # fmt: skip

    def _validate(self, phase: int, loss: float) -> None:
        self._require_finite("the loss was", math.isfinite(loss))
        final = phase == len(self.task.phase_steps) - 1
        row: dict[str, Any] = {}
        if self.rank == 0:
            images, predictions = self.validation
            said = self.training.predict(images)
            # A last step may break weights that no loss was computed with.
            self._require_finite("predictions were", bool(np.isfinite(said).all()))
            table = with_probabilities(predictions, said, self.task.classes)
            scores = validation_scores(table, self.task.classes, self.task.kind)
            value = scores["val_loss" if self.task.classifier.monitor == "loss" else self.task.classifier.monitor]
            row = {
                "step": self.training.step, "steps": sum(self.task.phase_steps), "phase": phase, "loss": loss, **scores,
                "monitor": self.task.classifier.monitor, "value": value, "time": time.time(),
                "trained_seconds": self._seconds(),
                # Only checkpoints of the last stage compete: a model that never saw its fine-tuning is not the arm.
                "best": final and self._better(value),
            }  # fmt: skip
        self.history.append(self._shared(row))
        if self.rank == 0:
            if self.history[-1]["best"]:
                self._keep(table)
            self._save()
            self.report({k: row[k] for k in ("step", "steps", "phase", "loss", "monitor", "value")})

    def _seconds(self) -> float:
        """Of this trial in all, lives before a kill included."""
        now, before = time.monotonic(), self.history[-1]["trained_seconds"] if self.history else 0.0
        seconds, self.began = before + now - self.began, now
        return round(seconds, 3)

    def _better(self, value: float) -> bool:
        kept = [r["value"] for r in self.history if r["best"]]
        if not kept:
            return True
        return value < min(kept) if self.task.classifier.monitor == "loss" else value > max(kept)

    def _stopped(self) -> bool:
        patience = self.task.classifier.early_stopping
        last = [r for r in self.history if r["phase"] == len(self.task.phase_steps) - 1]
        if patience is None or not last:
            return False
        best = max((i for i, r in enumerate(last) if r["best"]), default=0)
        return len(last) - 1 - best >= patience

    def _shared(self, row: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's row, on every rank: all must agree when to stop."""
        if self.world == 1:
            return row
        import torch

        rows = [row]
        torch.distributed.broadcast_object_list(rows, src=0)
        return rows[0]

    def _keep(self, validation: pa.Table) -> None:
        from raysynth.models.classifier_export import export_classifier

        t = self.task
        facts = {"classes": t.classes, "kind": t.kind, "step": self.training.step, "modality": t.modality}
        with tempfile.TemporaryDirectory(prefix="raysynth-model-") as folder:
            files = export_classifier(folder, self.training, facts)
            for name in files:
                t.storage.put(t.artifact.file(f"{MODEL}/{name}"), (Path(folder) / name).read_bytes())
        t.storage.put(t.artifact.file("validation.parquet"), to_parquet(validation))

    def _save(self) -> None:
        t = self.task
        with tempfile.TemporaryDirectory(prefix="raysynth-ckpt-") as folder:
            file = Path(folder) / "training.pt"
            self.training.save(str(file))
            # The history first: a checkpoint never knows less than it, and rows past the checkpoint are cut on resume.
            text = "".join(json.dumps(row) + "\n" for row in self.history)
            t.storage.put(t.artifact.file(HISTORY), text.encode())
            t.storage.put(t.artifact.file(STATE), file.read_bytes())
            t.storage.put(t.artifact.file(EVENTS), _events(self.history, Path(folder)))

    def _resume(self) -> None:
        t = self.task
        if not t.storage.exists(t.artifact.file(STATE)):
            return
        with tempfile.TemporaryDirectory(prefix="raysynth-ckpt-") as folder:
            file = Path(folder) / "training.pt"
            file.write_bytes(t.storage.get(t.artifact.file(STATE)))
            self.training.load(str(file))
        lines = t.storage.get(t.artifact.file(HISTORY)).decode().splitlines()
        self.history = [row for row in map(json.loads, lines) if row["step"] <= self.training.step]


def _events(history: list[dict[str, Any]], folder: Path) -> bytes:
    """TensorBoard's file of the whole history: written anew, so that a resumed run has one curve."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / "tb")) as curves:
        for row in history:
            for name in ("loss", "val_loss", "auroc", "balanced_accuracy", "accuracy"):
                if row.get(name) is not None:
                    curves.add_scalar(name, row[name], row["step"], walltime=row["time"])
    return next((folder / "tb").glob("events.*")).read_bytes()


def validation_view(task: ClassifierTask, view: View) -> tuple[np.ndarray, pa.Table]:
    """Pixels (N, H, W, C) uint8 and a predictions table without probabilities, of the task's validation images."""
    place = {name: i for i, name in enumerate(view.index["image_id"].to_pylist())}
    positions = [place[i] for i in task.validation]
    return view.images(positions), truth(view.index.take(positions), "val", task.classes, task.policy, task.kind)
