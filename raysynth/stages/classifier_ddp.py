"""A classifier trained by several processes: a Ray Train run nested in the trial that asked for it.

The gradient is that of one process on the global batch (raysynth.models.classifier); only `compute` differs, so the
artifact is the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from raysynth.stages import trainer
from raysynth.stages.classifier_loop import Loop
from raysynth.stages.classifier_task import ClassifierTask, Report, process_resources
from raysynth.stages.training_loop import threads

LOOK_S = 0.5
"""Between looks at what the processes reported."""


def fit(task: ClassifierTask, workers: int, report: Report) -> None:
    """Trains on `workers` processes and leaves model and predictions in the artifact's folder.

    Raises:
        EnvironmentFault: the processes died more often than they are restarted.
    """
    from ray.util.queue import Queue

    queue: Any = Queue(actor_options={"num_cpus": 0})
    try:
        trainer.fit(
            "train-classifier", train, {"task": task, "queue": queue}, task.artifact, workers,
            process_resources(task.compute, task.gpu), task.gpu, lambda work: reporting(work, queue, report),
        )  # fmt: skip
    finally:
        queue.shutdown(grace_period_s=1)


def reporting(work: Callable[[], Any], queue: Any, report: Report) -> Any:
    """Runs `work` in a thread and hands on, from this one, which alone Tune may know, every row that comes meanwhile.

    Args:
        queue: a `ray.util.queue.Queue`.

    Returns:
        What `work` returns.

    Raises:
        Whatever `work` raises, once its rows are reported.
    """
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        ended = False
        while not ended:
            ended = bool(wait([working], LOOK_S).done)
            for row in queue.get_nowait_batch(queue.qsize()):
                report(row)
        return working.result()


def train(config: dict[str, Any]) -> None:
    """The train function of Ray Train."""
    import ray.train
    import ray.train.torch
    import torch

    task, queue = config["task"], config["queue"]
    context = ray.train.get_context()
    device = str(ray.train.torch.get_device()) if task.gpu else "cpu"
    with threads(max(1, int(task.compute.trial_cpus))):
        Loop(task, queue.put, device, (context.get_world_rank(), context.get_world_size())).run()
        # Ray ends the group once a rank returns.
        torch.distributed.barrier()
