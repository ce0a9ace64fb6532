"""A Ray head as `ray start` makes it: a job sent by `ray job submit`; a second node that does not share the root."""

from __future__ import annotations

import json
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
from typing import Any

import promql_parser
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.engine import keys_of, synthetic_set, wanted_rows
from tests.ports import free_port
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
QUICKSTART = "raysynth/quickstart.yaml"
# The whole road with two arms and the fewest steps; how good the answer is, is not this test's to say.
SMALL = [
    "sweep.only=[real,mix x1]", "evaluation.primary.arm=mix x1", "sweep.seeds=[0]", "generator.steps=20",
    "classifier.steps=10", "evaluation.bootstraps=100",
]  # fmt: skip

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@dataclass
class Head:
    """A running Ray head."""

    address: str
    dashboard: str
    metrics: str
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


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with a dashboard on loopback, ended by pid."""
    port, dashboard, metrics = free_port(), free_port(), free_port()
    place = tempfile.mkdtemp(prefix="rh", dir="/tmp")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
    here = "http://127.0.0.1"
    found = Head(f"127.0.0.1:{port}", f"{here}:{dashboard}", f"{here}:{metrics}/metrics", environment, [])
    found.start(
        "--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        # The default port is any other Ray's on this machine too; without it no job can be submitted.
        f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={metrics}", "--num-cpus=2",
        "--object-store-memory=200000000", f"--temp-dir={place}",
    )  # fmt: skip
    wait_for(lambda: all(map(listens, (port, dashboard, metrics))), every_s=0.2)
    yield found
    for process in found.processes:
        os.killpg(process.pid, signal.SIGTERM)
    for process in found.processes:
        try:
            process.wait(5)
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
    assert "2 trials done" in text
    assert len(list(root.glob("train-classifier/*/_SUCCESS"))) == 2
    assert list(root.glob("report/*/index.html"))


def scrape(url: str, name: str, into: dict[str, list[dict[str, str]]]) -> dict[tuple[str, str], float]:
    """Reads what a Prometheus endpoint says of one set and of Ray; other sets may have been rendered before it.

    Args:
        into: metric -> labels of each of its series, kept over scrapes.

    Returns:
        (metric, value of `status`, `outcome` or `step`) -> value, of this project's metrics.
    """
    values = {}
    for family in text_string_to_metric_families(requests.get(url, timeout=20).text):
        for sample in family.samples:
            if sample.labels.get("set", name) != name:
                continue
            into.setdefault(sample.name, []).append(sample.labels)
            kind = sample.labels.get("status") or sample.labels.get("outcome") or sample.labels.get("step", "")
            values[sample.name, kind] = sample.value
    return values


def used(expression: Any) -> list[tuple[str, set[str]]]:
    """(metric, labels it must have) of every selector in a PromQL expression."""
    if isinstance(expression, promql_parser.MatrixSelector):
        return used(expression.vector_selector)
    if isinstance(expression, promql_parser.VectorSelector):
        return [(expression.name, {m.name for m in expression.matchers.matchers})]
    if isinstance(expression, promql_parser.AggregateExpr):
        grouped = set(expression.modifier.labels) if expression.modifier else set()
        return [(name, labels | grouped) for name, labels in used(expression.expr)]
    parts = [getattr(expression, part, None) for part in ("lhs", "rhs", "expr")] + list(getattr(expression, "args", []))
    return [found for part in parts if part is not None for found in used(part)]


def test_prometheus_grafana_and_the_dashboards_names(head: Head, tmp_path: Path) -> None:
    """One real rendering, with a row that fails: what Prometheus is told of it, and what Ray's dashboard calls it."""
    n, replicas = 12, 8
    bad = keys_of(wanted_rows(n, replicas))[3]
    how = {
        "address": head.address, "n": n, "replicas": replicas, "compute": {"cpus_per_renderer": 0.5},
        "renderer": {"seconds_a_row": 0.1, "broken": [bad]},
    }  # fmt: skip
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.ray.driver", str(tmp_path), json.dumps(how)], env=head.environment,
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    store = synthetic_set(str(tmp_path))
    name, seen = store.path.rpartition("/")[2], dict[str, list[dict[str, str]]]()
    board = (REPOSITORY / "cluster" / "grafana" / "raysynth.json").read_text()
    panels = json.loads(board)["panels"]
    for variable, value in {"$set": ".*", "$window": "5m", "$price": "2.5"}.items():
        board = board.replace(variable, value)
    asked = [used(promql_parser.parse(t["expr"])) for p in json.loads(board)["panels"] for t in p["targets"]]
    of_gpus = {"ray_node_gpus_utilization", "ray_node_gram_used"}  # this machine has no GPU
    names = {n for pairs in asked for n, _ in pairs} - of_gpus
    while driver.poll() is None:
        scrape(head.metrics, name, seen)
        time.sleep(2)
    said = driver.communicate()[0]
    assert driver.returncode == 0, said
    values = scrape(head.metrics, name, seen)

    def all_told() -> bool:
        scrape(head.metrics, name, seen)
        return names <= seen.keys()

    wait_for(all_told, 60, every_s=2)  # Ray tells some of its own every ten seconds only

    prefix = "ray_raysynth"
    assert values[f"{prefix}_images_total", "ok"] == pytest.approx(n * replicas - 1)
    assert values[f"{prefix}_images_total", "failed"] == pytest.approx(1)
    assert values[f"{prefix}_shards_total", "committed"] == n * replicas / 8 == len(store.done())
    assert values[f"{prefix}_shards_total", "second opinion"] == 1
    assert values[f"{prefix}_shards_retried_total", ""] == pytest.approx(1)
    assert values[f"{prefix}_rows_done", ""] == values[f"{prefix}_rows_wanted", ""] == n * replicas
    rendered = sum(m["render_seconds"] for m in store.markers(store.done()).values())
    assert values[f"{prefix}_seconds_total", "render"] == pytest.approx(rendered, abs=0.1)
    workers = {m["worker"] for m in store.markers(store.done()).values()}
    assert {labels["worker"] for labels in seen[f"{prefix}_busy_share"]} <= workers
    own = [labels for name, found in seen.items() if name.startswith(prefix) for labels in found]
    assert all("set" in labels for labels in own)

    # What Grafana draws is there, with the labels it asks for; the GPUs' come from Ray's source.
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    for name in of_gpus:
        columns = METRICS_GAUGES[name.removeprefix("ray_")].view.columns
        seen[name] = [dict.fromkeys(map(str, columns), "")]
    assert sorted(p["id"] for p in panels) == list(range(1, len(panels) + 1))
    assert {p["datasource"]["uid"] for p in panels} == {"${datasource}"}
    assert all(asked)
    for name, labels in [pair for pairs in asked for pair in pairs]:
        assert name in seen, name
        assert any(labels <= has.keys() for has in seen[name]), (name, labels, seen[name][0])
    # Nothing is measured that is not drawn.
    drawn = {name for pairs in asked for name, _ in pairs}
    of_histograms = ("_created", "_sum", "_count")
    assert {name for name in seen if name.startswith(prefix) and not name.endswith(of_histograms)} == {
        name for name in drawn if name.startswith(prefix)
    }

    def told(path: str) -> Any:
        return requests.get(head.dashboard + path, timeout=60).json()

    job = next(j for j in told("/api/jobs/") if "tests.ray.driver" in j["entrypoint"])
    assert job["metadata"]["experiment"] == "t"
    rounds = told(f"/api/data/datasets/{job['job_id']}")["datasets"]
    assert all(r["dataset"].startswith("render-t") for r in rounds)
    assert {o["name"] for r in rounds for o in r["operators"]} == {"Input", "MapBatches(Render(t by g))"}
    actors = told(f"/api/v0/actors?filter_keys=job_id&filter_predicates=%3D&filter_values={job['job_id']}")
    names = [a["class_name"] for a in actors["data"]["result"]["result"]]
    assert names.count("MapWorker(MapBatches(Render(t by g)))") >= 2


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
