"""`python -m tests.ray.driver ROOT JSON`: a rendering driver in a process of its own, to be killed.

JSON keys: `renderer` (FakeRenderer arguments), `n`, `replicas`, `compute` (Compute fields), and where to run:
`address` of a Ray, `cpus` of a private one, or `nodes` of one CPU each in a private cluster, of which one is killed
when `kill_node_after` shards are done. Prints `done` last, and ends as the command line does.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

from raysynth.cli import guarded
from raysynth.core.experiment import Compute
from raysynth.stages import cluster
from raysynth.stages.generate import render
from raysynth.synth.fake import FakeRenderer
from tests.engine import synthetic_set, wanted_rows
from tests.waiting import wait_for

QUIET = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}


def private_cluster(root: str, nodes: int, kill_after: int, gate: Path) -> str:
    """Starts a cluster whose head has no CPU; kills one node when `kill_after` shards are done, then opens the gate.

    Returns its address.
    """
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
    added = [made.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(nodes)]
    made.wait_for_nodes()

    def kill() -> None:
        wait_for(lambda: len(synthetic_set(root).done()) >= kill_after)
        try:
            made.remove_node(added[0], allow_graceful=False)
            print("killed a node", flush=True)
        finally:
            gate.touch()

    threading.Thread(target=kill, daemon=True).start()
    return made.address


def main(root: str, how: dict) -> None:
    import ray

    print("driver is up", flush=True)

    compute = Compute(**({"render_workers": 2, "micro_batch": 4, "shard_rows": 8} | how.get("compute", {})))
    if "nodes" in how:
        gate = Path(how["renderer"]["gate"])
        ray.init(address=private_cluster(root, how["nodes"], how["kill_node_after"], gate), logging_level="error")
    elif "address" in how:
        compute = replace(compute, address=how["address"])
    else:
        ray.init(
            address="local", num_cpus=how["cpus"], object_store_memory=128 << 20, **QUIET,
            _temp_dir=tempfile.mkdtemp(prefix="rd", dir="/tmp"),
        )  # fmt: skip
    wanted = wanted_rows(how.get("n", 12), how.get("replicas", 3))
    factory = partial(FakeRenderer, **how.get("renderer", {}))
    render(synthetic_set(root), wanted, factory, compute, cluster.connect(compute, "t"))
    print("done", flush=True)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1], json.loads(sys.argv[2])))
