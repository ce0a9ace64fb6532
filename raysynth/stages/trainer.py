"""Runs a train function in the processes of Ray Train: how such a run is named, stored, restarted and ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import EnvironmentFault, RaysynthError
from raysynth.core.s3 import S3Storage

WORKER_FAILURES = 3
"""Times that Ray Train restarts the processes from the last checkpoint."""
START_FAILURES = 5
"""Times that Ray Train waits (a minute each) for processes that do not start; its own default is for ever."""


def aside(work: Callable[[], Any]) -> Any:
    """Does the work in a thread of its own: in the main one Ray Train takes Ctrl-C over, and ends without words."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


def has_dashboard() -> bool:
    """Whether the cluster that this process is connected to has a dashboard."""
    from ray._private.worker import global_worker

    return bool(global_worker.gcs_client.internal_kv_get(b"webui:url", b"dashboard"))


def fit(
    stage: str, loop: Callable[[dict[str, Any]], Any], config: dict[str, Any], artifact: Artifact, workers: int,
    resources: dict[str, float], gpu: bool, wait: Callable[[Callable[[], Any]], Any] = aside,
) -> Any:  # fmt: skip
    """Runs `loop(config)` in `workers` processes.

    Args:
        stage: for messages.
        artifact: the run's state lies in its `checkpoints/`.
        workers: how many; 0 runs the loop in this process (Ray Train's local mode).
        resources: of each process.
        wait: calls what it is given, which returns when the run has ended, and returns its result.

    Returns:
        What the loop of rank 0 returned.

    Raises:
        EnvironmentFault: the processes died more often than they are restarted.
        RaysynthError: the loop's own.
    """
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    storage, filesystem = artifact.storage, None
    place = storage.url(artifact.file("checkpoints"))
    if isinstance(storage, S3Storage):
        import pyarrow.fs

        # Through s3fs, because pyarrow's own S3 ignores the endpoint of stores other than AWS.
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.fs))
        place = place.removeprefix("s3://")

    class Trainer(TorchTrainer):
        """Without the actor that removes a dead controller's placement group: it asks the dashboard. Where there is
        none it can do nothing, and every run would end by waiting 12 idle seconds for its answer."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            if has_dashboard():
                return callbacks
            return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

    trainer = Trainer(
        loop,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            # The identity is in the name: under an old name Ray would hand back another config's result.
            name=f"run-{artifact.fp}",
            storage_path=place,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=WORKER_FAILURES, controller_failure_limit=START_FAILURES
            ),
        ),
    )
    try:
        result = wait(trainer.fit)
    except (WorkerGroupError, ControllerError) as error:
        for failure in getattr(error, "worker_failures", {}).values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, RaysynthError):
                raise cause from None
        raise EnvironmentFault(f"{stage}: training processes failed ({error}). The same command continues.") from error
    return result.return_value
