"""A Ray head as `ray start` makes it: a job sent by `ray job submit`; a second node that does not share the root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
QUICKSTART = "raysynth/quickstart.yaml"
# The whole road with the fewest steps; how good the answer is, is not this test's to say.
SMALL = ["generator.steps=20", "classifier.steps=10", "sweep.seeds=[0]", "evaluation.bootstraps=100"]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@dataclass
class Head:
    """A running Ray head."""

    address: str
    dashboard: str
    environment: dict[str, str]
    processes: list[subprocess.Popen]

    def start(self, *words: str, before: str = "") -> None:
        """One more `ray start --block`; `before`: shell commands in a mount namespace of its own."""
        command = [RAY, "start", "--block", "--disable-usage-stats", *words]
        if before:
            command = ["unshare", "--mount", "sh", "-c", f'{before} && exec "$0" "$@"', *command]
        self.processes.append(subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ))  # fmt: skip

    def run(self, *command: str, timeout_s: float = 840) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port: int, what: str) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"{what} did not start")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with a dashboard on loopback, ended by pid."""
    port, dashboard = free_port(), free_port()
    place = tempfile.mkdtemp(prefix="rh", dir="/tmp")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
    found = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment, [])
    found.start(
        "--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        # The default port is any other Ray's on this machine too; without it no job can be submitted.
        f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=2", "--object-store-memory=200000000",
        f"--temp-dir={place}",
    )  # fmt: skip
    wait_for(port, "the head")
    wait_for(dashboard, "the dashboard")
    yield found
    for process in found.processes:
        os.killpg(process.pid, signal.SIGTERM)
    for process in found.processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
    shutil.rmtree(place, ignore_errors=True)


def test_the_quickstarts_experiment_by_ray_job_submit(head: Head, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for _ in range(60):
        done = head.run(
            RAY, "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--",
            sys.executable, "-m", "raysynth", "run", QUICKSTART, f"root={root}", *SMALL,
        )  # fmt: skip
        text = done.stdout + done.stderr
        if "No available agent" not in text:  # it starts after the dashboard does
            break
        time.sleep(2)
    assert done.returncode == 0, text[-3000:]
    assert "succeeded" in text
    assert "8 trials done" in text
    assert len(list(root.glob("train-classifier/*/_SUCCESS"))) == 8
    assert list(root.glob("report/*/index.html"))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mount namespaces need root")
def test_a_folder_that_another_node_does_not_see_is_refused(head: Head, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    head.start(
        f"--address={head.address}", "--num-cpus=1", f"--dashboard-agent-listen-port={free_port()}",
        before=f"mount -t tmpfs none {root}",
    )  # fmt: skip
    words = ["-m", "raysynth", "ingest", QUICKSTART, f"root={root}", f"compute.address={head.address}"]
    for _ in range(60):
        nodes = head.run(RAY, "list", "nodes", "--address", head.dashboard, timeout_s=60)
        if nodes.stdout.count("ALIVE") == 2:
            break
        time.sleep(1)
    done = head.run(sys.executable, *words)
    assert done.returncode == 4, done.stdout + done.stderr
    assert f"root {root}: 1 of 2 nodes do not see this folder. Use s3://bucket/prefix" in done.stdout
    assert not list(root.glob("ingest/*"))
