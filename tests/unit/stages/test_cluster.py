"""Joining a cluster that is not there ends at once, with words."""

from __future__ import annotations

import pytest

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.stages.cluster import connect
from tests.ports import free_port


def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    port = free_port()
    with pytest.raises(EnvironmentFault, match=rf"compute.address 127.0.0.1:{port}: no Ray cluster answers.*ray start"):
        connect(Compute(address=f"127.0.0.1:{port}"))
