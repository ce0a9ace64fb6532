"""A classifier trained by several processes: a Ray Train run nested in the trial that asked for it.

The gradient is that of one process on the global batch (raysynth.models.classifier); only `compute` differs, so the
artifact is the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from raysynth.core.errors import EnvironmentFault, RaysynthError
from raysynth.core.s3 import S3Storage
from raysynth.stages.classifier_loop import Loop
from raysynth.stages.classifier_task import ClassifierTask, Report, process_resources
from raysynth.stages.training_loop import threads

WORKER_FAILURES = 3
LOOK_S = 0.5
"""Between looks at what the processes reported."""


def fit(task: ClassifierTask, workers: int, report: Report) -> None:
    """Trains on `workers` processes and leaves model and predictions in the artifact's folder.

    Raises:
        EnvironmentFault: the processes died more often than they are restarted.
    """
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
    from ray.util.queue import Queue

    storage, filesystem = task.storage, None
    place = storage.url(task.artifact.file("checkpoints"))
    if isinstance(storage, S3Storage):
        import pyarrow.fs

        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.fs))
        place = place.removeprefix("s3://")
    queue: Any = Queue(actor_options={"num_cpus": 0})
    each = process_resources(task.compute, task.gpu)
    trainer = TorchTrainer(
        train,
        train_loop_config={"task": task, "queue": queue},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=task.gpu, resources_per_worker=each),
        run_config=ray.train.RunConfig(
            name=f"run-{task.artifact.fp}", storage_path=place, storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=WORKER_FAILURES, controller_failure_limit=5),
        ),
    )  # fmt: skip
    try:
        reporting(trainer.fit, queue, report)
    except (WorkerGroupError, ControllerError) as error:
        for failure in getattr(error, "worker_failures", {}).values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, RaysynthError):
                raise cause from None
        raise EnvironmentFault(f"train-classifier: training processes failed ({error}).") from error
    finally:
        queue.shutdown(grace_period_s=1)


def reporting(work: Callable[[], Any], queue: Any, report: Report) -> None:
    """Runs `work` in a thread and hands on, from this one, which alone Tune may know, every row that comes meanwhile.

    Args:
        queue: a `ray.util.queue.Queue`.

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
        working.result()


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
