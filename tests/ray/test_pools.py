"""Render pools on a cluster whose nodes come and go: which nodes may render, how many actors, where they end up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysynth.synth.fake import FakeRenderer
from raysynth.synth.verify import verify
from tests.engine import images, render_all, synthetic_set, wanted_rows
from tests.ray.playground import Driver, Playground

pytestmark = pytest.mark.ray

REPLICAS = 40
WANTED = wanted_rows(replicas=REPLICAS)


def gpu_node(accelerator: str, market: str) -> dict[str, Any]:
    """One logical GPU of a type, on a machine of a kind."""
    resources = {f"accelerator_type:{accelerator}": 1}
    return {"num_cpus": 2, "num_gpus": 1, "resources": resources, "labels": {"market-type": market}}


@pytest.fixture
def ground() -> Iterator[Playground]:
    made = Playground([gpu_node("H100", "spot")])
    yield made
    made.close()


def test_a_pool_keeps_to_its_nodes_and_goes_with_them(ground: Playground, tmp_path: Path) -> None:
    """Two actors a GPU, on spot machines with an H100 only; a second such machine joins, then the first one leaves."""
    first = ground.nodes[0]
    others = [ground.add_a_node(**gpu_node(*kind)) for kind in (("H100", "on-demand"), ("A100", "spot"))]
    compute = {
        "render_workers": 2, "max_render_workers": 4, "gpus_per_renderer": 0.5, "cpus_per_renderer": 0.5,
        "accelerator": "H100", "render_labels": {"market-type": "spot"},
    }  # fmt: skip
    log, gate = tmp_path / "log", tmp_path / "gate"
    # Every actor commits one shard and waits in the middle of the next, until the first node is lost.
    renderer = {"log": str(log), "gate": str(gate), "gate_after": 12}
    how = {"address": ground.cluster.address, "replicas": REPLICAS, "compute": compute, "renderer": renderer}
    driver = Driver(tmp_path, 0, how)

    def who_rendered() -> set[int]:
        return {int(line.split()[1]) for line in log.read_text().splitlines()} if log.exists() else set()

    actors: dict[str, set[int]] = {"first": set(), "second": set()}
    second = None
    most = 0
    end = time.monotonic() + 600
    while driver.process.poll() is None:
        assert time.monotonic() < end, driver.said()
        nodes = {"first": first, "second": second}
        for name, node in nodes.items():
            if node in ground.nodes:
                actors[name] |= {p.pid for p in ground.actors([node])}
        assert not ground.actors(others), "on a node that was not asked for"
        most = max(most, len(ground.actors()))
        if second is None and len(who_rendered() & actors["first"]) == 2:
            second = ground.add_a_node(**gpu_node("H100", "spot"))
        if first in ground.nodes and len(who_rendered() & actors["second"]) == 2:
            ground.lose_a_node(first)
            gate.touch()
        time.sleep(0.1)
    assert not driver.fault(driver.process.returncode), driver.said()
    assert first not in ground.nodes, f"no rendering by the node that joined: {actors}, {who_rendered()}"
    assert len(actors["first"] & who_rendered()) == 2
    assert most <= 4
    store = synthetic_set(str(tmp_path / "set"))
    reference = synthetic_set(str(tmp_path / "reference"))
    render_all(reference, WANTED, FakeRenderer())
    assert images(store) == images(reference)
    assert verify(store, WANTED).clean
