"""Joins or starts Ray, quietly, and says what the cluster has.

Everything that must be set before `import ray` is set here; stages import ray only after this module.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute

QUIET = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, ray would build a second environment a worker
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _key, _value in QUIET.items():
    os.environ.setdefault(_key, _value)


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all."""

    cpus: int
    gpus: int
    nodes: int


def times(room: float, each: float) -> int:
    """How often `each` fits `room`, as typed: .1 fits 1 ten times, though the float .1 is a little more."""
    return math.floor(room / each + 1e-9)


def gpu_times(gpus: float, each: float) -> int:
    """How many processes of `each` GPUs fit `gpus`; a share of a GPU is never of two."""
    return int(gpus) * times(1, each) if each < 1 else times(gpus, each)


def slots(nodes: Sequence[Mapping[str, float]], one: Mapping[str, float]) -> int:
    """How many processes that each take `one` (above 0 of each kind) fit on nodes with these resources in all."""
    return sum(
        min((gpu_times if kind == "GPU" else times)(node.get(kind, 0), wanted) for kind, wanted in one.items())
        for node in nodes
    )


def connect(compute: Compute, experiment: str = "") -> Resources:
    """Joins the cluster of `compute.address` or RAY_ADDRESS; without either starts a private one on loopback.

    Args:
        experiment: its name, which Ray's list of jobs shows.

    Raises:
        EnvironmentFault: no cluster at the address.
    """
    address = compute.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # A private instance listens on loopback only; a token would be written to the home folder for nothing.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes its one node away
    import ray
    from ray.job_config import JobConfig

    if not ray.is_initialized():
        at_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            _require_listener(address)
            ray.init(
                address=address, include_dashboard=False if address == "local" else None,
                logging_level="error", log_to_driver=False, job_config=JobConfig(metadata={"experiment": experiment}),
            )  # fmt: skip
        except (OSError, RuntimeError, ValueError) as error:
            raise EnvironmentFault(
                f"compute.address {address}: no Ray cluster answers ({str(error).splitlines()[0]}). Start one with "
                "`ray start --head` and use compute.address=auto, or use compute.address=local."
            ) from error
        if callable(at_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_sigterm)  # Ray set its own, which ends without a word
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    total = ray.cluster_resources()
    alive = sum(1 for node in ray.nodes() if node["Alive"])
    found = Resources(int(total.get("CPU", 0)), int(total.get("GPU", 0)), alive)
    if compute.use_gpu and not found.gpus:
        raise EnvironmentFault("compute.use_gpu: the cluster has no GPU. Add a GPU node or set compute.use_gpu=null.")
    return found if compute.use_gpu is not False else Resources(found.cpus, 0, found.nodes)


def _require_listener(address: str) -> None:
    """Raises OSError where nothing listens at `host:port`; ray.init would wait for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def quiet_data_context() -> None:
    """Ray Data's settings for this driver: no progress bars, no execution log, hangs end."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.data._internal", "ray.data.dataset", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def require_shared_folder(root: str) -> None:
    """Proves on every node that a file written here is read there.

    Raises:
        EnvironmentFault: `root` is a folder that some node does not share.
    """
    import uuid
    from pathlib import Path

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = Path(root).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".shared-{uuid.uuid4().hex[:8]}"
    token.write_text(token.name)

    def reads() -> bool:
        return token.is_file() and token.read_text() == token.name

    try:
        nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
        ask = ray.remote(num_cpus=0)(reads)
        seen = ray.get([
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote() for n in nodes
        ])  # fmt: skip
    finally:
        token.unlink()
    if not all(seen):
        raise EnvironmentFault(
            f"root {root}: {seen.count(False)} of {len(nodes)} nodes do not see this folder. "
            "Use s3://bucket/prefix or a file system that all nodes mount."
        )
