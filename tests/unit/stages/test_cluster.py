"""Joining a cluster that is not there ends at once, with words; how many processes fit one that is."""

from __future__ import annotations

import pytest

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.stages.cluster import Resources, connect, slots
from raysynth.stages.render import worker_shape
from tests.ports import free_port


def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    port = free_port()
    with pytest.raises(EnvironmentFault, match=rf"compute.address 127.0.0.1:{port}: no Ray cluster answers.*ray start"):
        connect(Compute(address=f"127.0.0.1:{port}"))


def test_room_is_counted_node_by_node() -> None:
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 4.0}, {"CPU": 16.0}, {"GPU": 1.0}]
    assert slots(nodes, {"CPU": 1, "GPU": 1}) == 3
    assert slots(nodes, {"CPU": 2}) == 10
    assert slots(nodes, {"CPU": 17}) == 0


@pytest.mark.parametrize(("node", "one", "room"), [
    ({"CPU": 1}, {"CPU": 0.1}, 10), ({"CPU": 1}, {"CPU": 0.2}, 5), ({"CPU": 8, "GPU": 1}, {"CPU": 1, "GPU": 0.2}, 5),
    ({"CPU": 1}, {"CPU": 0.3}, 3), ({"GPU": 8}, {"GPU": 0.3}, 24), ({"GPU": 8}, {"GPU": 0.6}, 8),
    ({"GPU": 8}, {"GPU": 2}, 4), ({"CPU": 8}, {"GPU": 0.5}, 0),
])  # fmt: skip
def test_shares_fit_as_often_as_they_were_typed_to(node: dict[str, float], one: dict[str, float], room: int) -> None:
    assert slots([node], one) == room


@pytest.mark.parametrize(("gpus", "each", "workers"), [(8, 0.3, 24), (8, 0.1, 80), (8, 1, 8), (8, 2, 4), (1, 2, 1)])
def test_no_renderer_is_on_two_gpus_by_halves(gpus: int, each: float, workers: int) -> None:
    found = worker_shape(Compute(gpus_per_renderer=each), Resources(cpus=99, gpus=gpus, nodes=1))
    assert found == (workers, 1.0, each)
