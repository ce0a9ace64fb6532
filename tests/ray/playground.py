"""A small Ray cluster on this machine, and drivers, whose processes may be found and killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so Ray says where it is to listen on loopback only
}  # fmt: skip
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
# A node that is gone is known after 5 s at most; Ray's own 15 to 30 s only make the runs longer.
GCS = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}


class Playground:
    """A cluster whose nodes come and go; its head runs no renderer.

    Args:
        nodes: what each node has, as `ray.cluster_utils.Cluster.add_node` takes it; two of one CPU unless given.
    """

    def __init__(self, nodes: Sequence[Mapping[str, Any]] = ({}, {})) -> None:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from ray.cluster_utils import Cluster

        self.place = tempfile.mkdtemp(prefix="rc", dir="/tmp")
        head = NODE | {"num_cpus": 0, "temp_dir": self.place, "_system_config": GCS}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        for node in nodes:
            self.add_a_node(**node)
        self.cluster.wait_for_nodes()

    def add_a_node(self, **has: Any) -> Any:
        """A node joins: one CPU unless said otherwise."""
        self.nodes.append(self.cluster.add_node(**NODE | has))
        return self.nodes[-1]

    def workers(self, nodes: list[Any] | None = None) -> Iterator[psutil.Process]:
        """Ray worker processes, idle or not, on some nodes or on all."""
        for node in nodes or [self.cluster.head_node, *self.nodes]:
            for raylet in node.all_processes["raylet"]:
                for process in children(raylet.process.pid):
                    # A node ends with its agents; that kill is `lose_a_node`, and would take the drivers' own node.
                    if title(process).startswith("ray::") and "Agent" not in title(process):
                        yield process

    def actors(self, nodes: list[Any] | None = None) -> list[psutil.Process]:
        """The render actors, also while they start."""
        return [p for p in self.workers(nodes) if "Render" in title(p)]

    def lose_a_node(self, node: Any) -> None:
        """Kills a node at once."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def close(self) -> None:
        """Ends every process of the cluster."""
        self.cluster.shutdown()
        shutil.rmtree(self.place, ignore_errors=True)


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """What `ps` shows first; Ray names its workers there."""
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""


class Driver:
    """A rendering driver in a process of its own.

    Args:
        place: folder of the set and of what the driver says.
        how: as `tests.ray.driver` takes it.
    """

    def __init__(self, place: Path, number: int, how: dict[str, Any]) -> None:
        self.output = place / f"driver-{number}.txt"
        self.stopped = self.killed = False
        with open(self.output, "w") as f:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.ray.driver", str(place / "set"), json.dumps(how)],
                stdout=f, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2],
            )  # fmt: skip

    def said(self) -> str:
        return self.output.read_text()

    def fault(self, code: int) -> str:
        """What is wrong with its end; empty if nothing is."""
        if self.killed or (code == 0 and "done" in self.said()):
            return ""
        if self.stopped and code == 4 and "SIGTERM" in self.said() and "Nothing is lost" in self.said():
            return ""
        return f"a driver {'told to stop ' if self.stopped else ''}ended with {code}: {self.said()[-600:]}"
