"""`--retry-failed` reaches the images of a sweep's arms. The engine in one process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raysynth import cli
from raysynth.core.artifacts import Artifact
from raysynth.core.errors import GateFailed
from raysynth.core.experiment import Experiment
from raysynth.stages import generate, sweep
from raysynth.stages.cluster import Resources
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.plan import wanted_rows
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from tests.engine import keys_of, render_all
from tests.unit.stages.test_sweep import ARMS, experiment, ingested, planned


class Trains(Exception):
    """All images are made; the classifiers would follow."""


class Renderers:
    """Stands for the cluster: renders here, with rows that fail; counts the rows."""

    def __init__(self) -> None:
        self.broken: tuple[str, ...] = ()
        self.rows = 0

    def render(self, store: SyntheticSet, wanted: Wanted, *given: Any) -> dict[str, float]:
        _, _, _, retry_failed, _ = given  # renderer, compute, resources, ..., ledger
        done = render_all(store, wanted, FakeRenderer(broken=self.broken), retry_failed=retry_failed)
        self.rows += sum(s["ok"] + s["failed"] for s in done)
        return {}


@pytest.fixture
def renderers(monkeypatch: pytest.MonkeyPatch) -> Renderers:
    def train(*_: object) -> None:
        raise Trains

    found = Renderers()
    monkeypatch.setattr(generate, "render", found.render)
    monkeypatch.setattr(sweep, "_train", train)
    monkeypatch.setattr(Pipeline, "resources", Resources(cpus=1, gpus=0, nodes=1))
    return found


def arm_artifact(e: Experiment, renderers: Renderers) -> Artifact:
    """The generate artifact of the arm `x1`, whose second row breaks the renderer."""
    pipeline = ingested(e)
    planned(pipeline)
    p = next(p for arm, p in pipeline.arm_pipelines if arm.name == "x1")
    renderers.broken = (keys_of(wanted_rows(p.experiment, p.storage, p.plan))[1],)
    return p.generated


def swept(e: Experiment, retry_failed: bool = False) -> None:
    pipeline = ingested(e)
    pipeline.do("sweep", retry_failed)


def lenient(tmp_path: Path, fraction: float) -> Experiment:
    arms = {k: ARMS[k] for k in ("real", "x1")}
    return experiment(tmp_path, arms, compute={"max_failed_fraction": fraction})


def test_the_advice_of_the_gate_holds_for_a_sweep(tmp_path: Path, renderers: Renderers) -> None:
    e = lenient(tmp_path, 0.01)
    generated = arm_artifact(e, renderers)
    with pytest.raises(GateFailed, match=r"1 of 20 rows failed.*`--retry-failed` renders them once more"):
        swept(e)
    renderers.broken = ()
    with pytest.raises(GateFailed):
        swept(e)
    assert renderers.rows == 20
    with pytest.raises(Trains):
        swept(e, retry_failed=True)
    assert renderers.rows == 21
    assert generated.run_info()["counts"] == {"wanted": 20, "ok": 20, "failed": 0, "rejected": 0}


def test_rows_that_the_gate_let_pass_are_retried_too(
    tmp_path: Path, renderers: Renderers, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = lenient(tmp_path, 0.5)
    generated = arm_artifact(e, renderers)
    with pytest.raises(Trains):
        swept(e)
    assert generated.run_info()["counts"]["failed"] == 1
    renderers.broken = ()
    images = ingested(e).images
    monkeypatch.setattr(Pipeline, "images", images)
    monkeypatch.setattr(cli, "_load", lambda *_: e)
    for words, failed in ([], 1), (["--retry-failed"], 0):
        ended = CliRunner().invoke(cli.app, ["sweep", "any.yaml", *words])
        assert isinstance(ended.exception, Trains), ended.output
        assert generated.run_info()["counts"]["failed"] == failed
    assert renderers.rows == 21
