"""Joining a cluster that is not there ends at once, with words."""

from __future__ import annotations

import socket

import pytest

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.stages.cluster import connect


def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(EnvironmentFault, match=rf"compute.address 127.0.0.1:{port}: no Ray cluster answers.*ray start"):
        connect(Compute(address=f"127.0.0.1:{port}"))
