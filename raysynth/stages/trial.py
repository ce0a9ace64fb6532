"""Runs the trials of a sweep side by side with Ray Tune: one function trainable, one trial = one classifier.

Tune schedules, restarts trials whose process died, and tells the driver of validations. What was trained is in the
classifiers' own artifacts, so Tune's state is thrown away, and a trial whose process died goes on from its own
checkpoint. All trials get the same budget (FIFO): an arm that starts slowly is not cut off.

Input: `ClassifierTask`s. Output: how each ended. Knows nothing of arms, nor which images a task is about.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysynth.core.errors import EnvironmentFault, RaysynthError
from raysynth.core.experiment import Compute
from raysynth.core.faults import is_storage_fault
from raysynth.core.lease import Lease, holder_of
from raysynth.stages.classifier_task import ClassifierTask, process_resources
from raysynth.stages.cluster import slots
from raysynth.stages.sweep_table import SweepTable

WORKER_DEATHS = 3
"""Times that Tune restarts a trial whose process died."""
WAIT_S = 2.0
"""Between looks at a classifier that another process trains."""
TUNE_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # curves are in each classifier's own log
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a box even where it is told to be silent
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would turn Ctrl-C into a finished sweep
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # the root may be a relative folder
}


@dataclass(frozen=True)
class Ending:
    """How a trial ended."""

    reason: str = ""
    """Why it failed; empty: it did not."""
    environment: bool = False
    """Storage or cluster is at fault, and the same command may work later."""


def train_arm(config: dict[str, Any], tasks: Sequence[ClassifierTask]) -> None:
    """Tune's function trainable, in the worker: trains task `config["trial"]` and reports its validations."""
    from ray import tune

    from raysynth.stages.classifier_trial import run_trial

    task = tasks[config["trial"]]
    try:
        with _alone(task):
            run_trial(task, tune.report)
        ending = Ending()
    except RaysynthError as error:
        ending = Ending(str(error), isinstance(error, EnvironmentFault))
    except Exception as error:  # noqa: BLE001 - one trial's fault must not end the others' training
        ending = Ending(f"{type(error).__name__}: {error}\n{traceback.format_exc()}", is_storage_fault(error))
    # Here, where no traceback keeps the trial's tensors alive any more.
    leave_device(ending)
    # A dictionary, because Tune looks into results.
    tune.report({"ending": {"reason": ending.reason, "environment": ending.environment}})


def leave_device(ending: Ending) -> None:
    """Gives the GPU's memory back before the next trial takes over this process.

    An illegal access or a lost device breaks CUDA for the rest of a process: then the process ends, and Tune restarts
    the trial in another one.
    """
    import torch

    if not torch.cuda.is_initialized():
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # noqa: BLE001 - whatever it is, nothing more can be trained here
        print(f"{ending.reason}\nCUDA is broken in this process: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _alone(task: ClassifierTask) -> Lease:
    """The lock of the task's classifier, once no other process trains it: two sweeps may share an arm, and workers of
    a driver that was killed may live for a moment."""
    path = task.artifact.file("lock.json")
    while holder_of(task.storage, path) and not task.artifact.complete:
        time.sleep(WAIT_S)
    return Lease(task.storage, path)


def trial_resources(compute: Compute, gpu: bool) -> dict[str, float]:
    """What one trial takes of the cluster, in Ray's words; its workers', where it has several, come on top."""
    if (compute.classifier_workers or 1) > 1:
        # Tune refuses a trial of nothing; a byte is never scarce, a share of a CPU is what a worker then lacks.
        return {"memory": 1}
    return process_resources(compute, gpu)


def side_by_side(compute: Compute, gpu: bool, nodes: Sequence[dict[str, float]]) -> int:
    """How many trials fit these nodes at once.

    Raises:
        EnvironmentFault: not even one; Ray would wait for ever.
    """
    workers = compute.classifier_workers or 1
    each = process_resources(compute, gpu)
    room = slots(nodes, each) // workers
    if not room:
        one = " and ".join(f"{n:g} {kind}" for kind, n in each.items())
        raise EnvironmentFault(
            f"compute.trial_cpus, compute.trial_gpus: a trial takes {workers} process(es) of {one}, for which the "
            f"cluster's {len(nodes)} node(s) have no room. Lower them or add nodes."
        )
    return room


def run_trials(tasks: Sequence[ClassifierTask], compute: Compute, gpu: bool, table: SweepTable) -> list[Ending]:
    """Trains every task, as many at once as fit the cluster. Ray must be connected.

    Args:
        table: told of every start, validation and end; its rows are those of `tasks`.

    Raises:
        EnvironmentFault: the cluster has no room for a single trial.
    """
    import ray
    from ray import tune

    os.environ.update(TUNE_QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    concurrent = min(len(tasks), side_by_side(compute, gpu, nodes))
    watcher = _watcher(table)
    with tempfile.TemporaryDirectory(prefix="raysynth-tune-") as folder:
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(train_arm, tasks=list(tasks)), trial_resources(compute, gpu)
            ),
            param_space={"trial": tune.grid_search(list(range(len(tasks))))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent,
                # The next trial takes over the process, and with it the imports of torch and timm.
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep", storage_path=folder, verbose=0, callbacks=[watcher],
                failure_config=tune.FailureConfig(max_failures=WORKER_DEATHS),
            ),
        ).fit()
    lost = Ending("Ray Tune never ran it. The same command continues.", environment=True)
    return [watcher.endings.get(i, lost) for i in range(len(tasks))]


def _watcher(table: SweepTable) -> Any:
    """Tune's callback in the driver; made here because its base class imports Ray."""
    from ray import tune

    class Watcher(tune.Callback):
        def __init__(self) -> None:
            self.endings: dict[int, Ending] = {}

        def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            table.started(trial.config["trial"])

        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            number = trial.config["trial"]
            if "ending" in result:
                self._end(number, Ending(**result["ending"]))
            else:
                table.reported(number, result)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            died = f"its process died {WORKER_DEATHS + 1} times. The same command continues from its checkpoint."
            self._end(trial.config["trial"], Ending(died, environment=True))

        def _end(self, number: int, ending: Ending) -> None:
            # Tune repeats a trial's last result when it ends.
            if number not in self.endings:
                self.endings[number] = ending
                table.ended(number, ending.reason.splitlines()[0] if ending.reason else "")

    return Watcher()
