"""What the driver makes of its actors' answers, played to it; the actors themselves are in tests/ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.stages import render
from raysynth.stages.cluster import Resources
from raysynth.stages.live import Rendering, RenderView
from raysynth.stages.render_actor import SUMMED, RenderJob
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger
from raysynth.synth.waves import extend
from tests.engine import synthetic_set, wanted_rows

WANTED = wanted_rows()
CLUSTER = Resources(cpus=8, gpus=0, nodes=1)


def answer(outcome: str, shard: int, actor: int, **more: Any) -> dict[str, Any]:
    who = {"actor": f"a{actor}", "worker": f"h/{actor}", "reason": "", "attempt": 0}
    return {"outcome": outcome, "shard": shard, **who, **dict.fromkeys(SUMMED, 0.0), **more}


@pytest.fixture
def job(tmp_path: Path) -> RenderJob:
    store = synthetic_set(str(tmp_path))
    extend(Ledger(store), WANTED, 4, "test")
    return RenderJob(store, FakeRenderer, 4, False)


def test_a_driver_told_to_stop_hears_every_actor_of_a_pool_that_grew(
    job: RenderJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []

    def answers(*_: object) -> Iterator[dict[str, Any]]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        for i in range(9):
            heard.append(i)
            yield answer("stopped", i, i % 6)

    monkeypatch.setattr(render, "_round", answers)
    pending, compute = Ledger(job.store).pending(WANTED), Compute(render_workers=2, max_render_workers=6)
    view = RenderView(Rendering("x", 36, 0))
    with pytest.raises(EnvironmentFault, match="stopped by SIGTERM"):
        render.run_rounds(job, lambda: pending, compute, CLUSTER, view)
    assert heard == list(range(6)), "the first two are not all, and nobody is waited for after the sixth"


def test_what_another_driver_did_is_done_too(job: RenderJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*_: object) -> Iterator[dict[str, Any]]:
        yield answer("committed", 0, 1, ok=4, render_s=1.0)
        yield answer("at work", 1, 1)
        yield answer("committed", 1, 1, ok=3, failed=1, render_s=1.0)
        for shard in range(2, 9):
            yield answer("already", shard, 1)
        yield answer("already", 8, 1)  # a copy of it

    monkeypatch.setattr(render, "_round", answers)
    rounds = [Ledger(job.store).pending(WANTED), []]
    rendering = Rendering("x", 36, 0)
    with RenderView(rendering) as view:
        sums = render.run_rounds(job, lambda: rounds.pop(0), Compute(render_workers=1), CLUSTER, view)
    assert rendering.done == 36
    assert (rendering.sums.ok, rendering.sums.failed, sums["ok"]) == (7, 1, 7)
