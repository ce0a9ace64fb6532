"""What every training process of `train-generator` runs: batches, steps, checkpoints, sample grids, export.

Rank 0 writes; all ranks compute. Batches and draws are pure functions of the step, so that a run that was killed
goes on from its last checkpoint to the same weights.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute, Generator, Sampling
from raysynth.core.storage import Storage
from raysynth.data.conditions import ConditionSpec
from raysynth.data.images import encode_png
from raysynth.data.views import View, label_groups, order_for
from raysynth.synth.renderer import is_out_of_memory, to_uint8

LOG_EVERY = 10
STATE = "training.pt"
GRID_NOISES = 4
GRID_CONDITIONS = 10


@dataclass(frozen=True)
class Task:
    """Everything a training process needs; small, and picklable."""

    storage: Storage
    artifact: str
    """Folder of the train-generator artifact, relative to the root."""
    view: str
    """Folder of the training view, relative to the root."""
    generator: Generator
    spec: ConditionSpec
    classes: list[str]
    """Classes or findings that `class_balanced` balances."""
    facts: dict[str, Any]
    """For `generator.json`."""
    compute: Compute
    queue: Any
    """Where rank 0 sends its log rows."""


def train(config: dict[str, Any]) -> dict[str, Any]:
    """The train function of Ray Train.

    Returns:
        {"diverged": step} where the loss stopped being finite, {"fault": words} where memory did not suffice.
    """
    import ray.train.torch

    context = ray.train.get_context()
    device = str(ray.train.torch.get_device()) if config["gpu"] else "cpu"
    task: Task = config["task"]
    share = task.compute.train_threads or cores() // context.get_local_world_size()
    try:
        with threads(share), enough_memory("Raise compute.train_accumulation: the weights stay the same."):
            return {"diverged": _train(task, device, context.get_world_rank(), context.get_world_size())}
    except MemoryFault as fault:
        if context.get_world_size() > 1:
            raise  # the other ranks wait for this one, and only an error ends them
        return {"fault": str(fault)}  # Ray Train would answer an error with restarts, which need as much memory


def _train(task: Task, device: str, rank: int, world: int) -> int | None:
    """Trains and exports. Returns the step at which the loss was not finite, or None."""
    import torch

    from raysynth.models.ddpm import DDPMTraining
    from raysynth.stages.views import open_view_folder

    view = open_view_folder(task.storage, task.view, task.compute.cache)
    training = DDPMTraining(task.generator, task.spec.null, int(task.facts["channels"]), device)
    if world > 1:
        training.distribute()
    _resume(task, training)
    if rank == 0:
        task.queue.put({"resumed": training.step})
    loop = Loop(task, training, view, world, rank)
    diverged = loop.run()
    if diverged is None and rank == 0:
        _export(task, training)
    if world > 1:
        # Ray ends the group once a rank returns.
        torch.distributed.barrier()
    return diverged


class Loop:
    """Steps of one process until `generator.steps`."""

    def __init__(self, task: Task, training: Any, view: View, world: int, rank: int) -> None:
        self.task, self.training, self.view, self.rank, self.world = task, training, view, rank, world
        columns = view.columns()
        self.conditions = task.spec.encode(columns)
        generator = task.generator
        self.order = order_for(
            columns, task.classes, len(view), generator.class_balanced, generator.seed, generator.batch_size,
            task.spec.policy,
        )  # fmt: skip
        share = generator.batch_size // world
        self.mine = np.arange(rank * share, (rank + 1) * share)
        groups = label_groups(columns, task.classes, task.spec.policy) if task.classes else [np.arange(len(view))]
        firsts = [int(g[0]) for g in groups if len(g)][:GRID_CONDITIONS]
        self.grid = self.conditions[firsts]
        self.losses: Any = 0.0
        self.since, self.started = 0, time.monotonic()

    def run(self) -> int | None:
        """Trains to the end. Returns the step at which the loss was not finite, or None."""
        task, training, steps = self.task, self.training, self.task.generator.steps
        while training.step < steps:
            batch = self.order.batch(training.step)[self.mine]
            loss = training.update(
                self.view.images(batch), self.conditions[batch], self.mine, task.compute.train_accumulation
            )
            self.losses = self.losses + loss
            self.since += 1
            done = training.step
            ends = done == steps
            saves = ends or done % task.compute.checkpoint_every == 0
            if (saves or done % LOG_EVERY == 0) and not self._log():
                return done
            if saves:
                self._checkpoint()
            if (ends or done % task.compute.sample_every == 0) and self.rank == 0:
                picture = sample_grid(training, self.grid, task.spec.null)
                task.storage.put(f"{task.artifact}/samples/{done:08d}.png", picture)
        return None

    def _log(self) -> bool:
        import torch

        mean = torch.as_tensor(self.losses / self.since)
        if self.world > 1:
            torch.distributed.all_reduce(mean)
            mean = mean / self.world
        value, elapsed = float(mean), time.monotonic() - self.started
        rate = self.since / elapsed if elapsed > 0 else 0.0
        if self.rank == 0:
            self.task.queue.put({
                "step": self.training.step, "loss": value, "lr": self.training.optimizer.param_groups[0]["lr"],
                "steps_per_s": round(rate, 3), "images_per_s": round(rate * self.task.generator.batch_size, 2),
            })  # fmt: skip
        self.losses, self.since, self.started = 0.0, 0, time.monotonic()
        return math.isfinite(value)

    def _checkpoint(self) -> None:
        import ray.train

        if self.rank == 0:
            with tempfile.TemporaryDirectory(prefix="raysynth-ckpt-") as folder:
                file = Path(folder) / STATE
                self.training.save(str(file))
                self.task.storage.put(state_file(self.task.artifact), file.read_bytes())
        ray.train.report({"step": self.training.step})


def state_file(artifact: str) -> str:
    """Where a run keeps its state, replaced whole; Ray's own checkpoints would not be seen by its local mode."""
    return f"{artifact}/checkpoints/{STATE}"


def _resume(task: Task, training: Any) -> None:
    if task.storage.exists(state_file(task.artifact)):
        with tempfile.TemporaryDirectory(prefix="raysynth-ckpt-") as folder:
            file = Path(folder) / STATE
            file.write_bytes(task.storage.get(state_file(task.artifact)))
            training.load(str(file))


def _export(task: Task, training: Any) -> None:
    from raysynth.models.export import export_generator

    with tempfile.TemporaryDirectory(prefix="raysynth-export-") as folder:
        files = export_generator(folder, task.generator, training.ema.module, task.spec, task.facts)
        for name in files:
            task.storage.put(f"{task.artifact}/export/{name}", (Path(folder) / name).read_bytes())
    # Written last: where it is, the export is whole.
    task.storage.put(f"{task.artifact}/export.json", json.dumps(files, indent=1).encode())


def sample_grid(training: Any, conditions: np.ndarray, null: np.ndarray) -> bytes:
    """PNG of moving-average samples in fixed noise: a row a condition, a column a noise.

    Args:
        conditions: (N, dim) float32. null: (dim,) float32.
    """
    import torch

    from raysynth.synth.samplers import sample

    sampling = Sampling(sampler="dpm++", steps=min(25, training.generator.timesteps))
    shape = (training.channels, training.generator.size, training.generator.size)
    rows = []
    for condition in conditions:
        told = torch.from_numpy(condition).expand(GRID_NOISES, -1).to(training.device)
        noise = [torch.Generator("cpu").manual_seed(i) for i in range(GRID_NOISES)]
        images = sample(
            training.ema.module, training.scheduler.config, told, torch.from_numpy(null).to(training.device),
            noise, shape, sampling,
        )  # fmt: skip
        rows.append(torch.cat(list(images), dim=2))
    return encode_png(to_uint8(torch.cat(rows, dim=1).cpu().numpy()))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(wanted: int) -> Iterator[None]:
    """Limits torch to this many threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, wanted))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class MemoryFault(EnvironmentFault):
    """Training takes more memory than its device has."""


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Raises MemoryFault, with what to change, where the block takes more memory than its device has."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise MemoryFault(f"training takes more memory than there is ({said}). {remedy}") from error
