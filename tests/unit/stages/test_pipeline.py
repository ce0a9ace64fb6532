"""Which artifact a run goes on with, where rows are saved, another experiment is quicker, or nothing is copied yet.

No Ray: rendering, training and judging are stood for by the least that leaves their artifacts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raysynth import cli
from raysynth.core.artifacts import Artifact
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import open_storage
from raysynth.data.conditions import ConditionSpec
from raysynth.stages import adoption, generate, pipeline, preflight, sweep
from raysynth.stages.cluster import Resources
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.plan import wanted_rows
from raysynth.stages.predictions import open_test_sets
from raysynth.stages.train_classifier import Trial
from raysynth.synth.fake import FakeRenderer
from tests.digits import CLASSES, digit_artifact
from tests.engine import keys_of, render_all
from tests.unit.stages.test_sweep import ARMS, experiment, ingested, planned

Run = Callable[..., str]
UNMEASURED: dict[str, Any] = {"evaluation": {"fidelity": {"extractor": "none"}}}


class Here:
    """What was made, in this process."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.trained: list[str] = []
        self.shown: list[list[str]] = []


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    made = Here()

    def render(store: Any, wanted: Any, *given: Any) -> dict[str, float]:
        render_all(store, wanted, FakeRenderer(broken=tuple(made.broken)), retry_failed=given[3])
        return {}

    def train(own: Pipeline, missing: Sequence[Trial], before: int) -> dict:
        for trial in missing:
            made.trained.append(trial.classifier.path)
            trial.classifier.put("model", trial.classifier.path.encode())
            facts = {"ratio": 1.0, "n_real": 1, "n_synth": 1, "architecture": "a", "init": "i"}
            trial.classifier.commit(
                {"steps": 1}, facts=facts, best_step=1, monitor="auroc", value=1.0, train_seconds=1.0
            )
        return {}

    def evaluate(e: Experiment, storage: Any, images: Artifact, trials: Sequence[Trial]) -> Artifact:
        found = pipeline.evaluate_artifact(e, storage, trials, open_test_sets(e, storage, images))
        found.commit({})
        return found

    monkeypatch.setattr(generate, "render", render)
    monkeypatch.setattr(sweep, "_train", train)
    monkeypatch.setattr(pipeline, "evaluate", evaluate)
    monkeypatch.setattr(Pipeline, "resources", Resources(cpus=1, gpus=0, nodes=1))
    monkeypatch.setattr(preflight, "_check_classifiers", lambda trials: None)
    monkeypatch.setattr(cli, "_report", lambda p: made.shown.append([t.classifier.path for t in p.trials]))
    return made


def start(e: Experiment, monkeypatch: pytest.MonkeyPatch, verb: str = "run") -> Run:
    """Ingests; returns what runs the command in this process, and gives what it printed."""
    images = ingested(e).images
    monkeypatch.setattr(Pipeline, "images", images)
    monkeypatch.setattr(pipeline, "ingest", lambda e, storage: images)
    monkeypatch.setattr(cli, "_load", lambda *_: e)

    def run(*words: str) -> str:
        done = CliRunner().invoke(cli.app, [verb, "any.yaml", *words], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    return run


def test_saved_rows_reach_the_report_of_the_same_run(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = experiment(tmp_path, {k: ARMS[k] for k in ("real", "x1")}, compute={"max_failed_fraction": 0.5}, **UNMEASURED)
    run = start(e, monkeypatch)
    planned(Pipeline(e))
    arm = next(p for a, p in Pipeline(e).arm_pipelines if a.name == "x1")
    here.broken.append(keys_of(wanted_rows(arm.experiment, arm.storage, arm.plan))[1])
    run()
    first = len(here.trained)
    here.broken.clear()
    run("--retry-failed")
    new = here.trained[first:]
    assert len(new) == 2
    assert set(new) <= set(here.shown[-1])


def test_a_generator_that_another_experiment_finished_first(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(e: Experiment, storage: Any, images: Artifact) -> Artifact:
        own = pipeline.generator_artifact(e, storage, images)
        if not own.complete:
            other = Artifact(storage, own.stage, "other", own.identity)
            other.put("export/condition.json", b"x")
            other.commit({})
        return pipeline.generator_artifact(e, storage, images)

    monkeypatch.setattr(pipeline, "train_generator", train)
    e = experiment(tmp_path, {k: ARMS[k] for k in ("real", "x1")})
    out = start(e, monkeypatch, "sweep")()
    assert "sweep: 4 trials done (4 trained now)" in out


def given_generator(root: Path) -> str:
    """A generator in another root, which says what it saw."""
    storage = open_storage(str(root))
    images = digit_artifact(storage, n=160, val=True)
    table = from_parquet(storage.get(images.file("table.parquet")))
    seen = table.filter([s == "train" for s in table["split"].to_pylist()])
    spec = ConditionSpec("single", list(CLASSES), list(CLASSES))
    found = Artifact.at(storage, "train-generator", "g", 2, {}, {})
    for name in adoption.NEEDED:
        found.put(f"export/{name}", b'{"num_train_timesteps": 1000, "sample_size": 8, "in_channels": 1}')
    found.put("export/condition.json", spec.to_json().encode())
    found.put("export/generator.json", json.dumps({"n_real_generator": seen.num_rows, "train_on": "train"}).encode())
    found.put("seen.parquet", to_parquet(adoption.seen_table(seen)))
    found.commit({})
    return storage.url(found.path)


def test_a_given_generator_is_copied_before_an_upper_bound_asks_it(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no arm renders with it."""
    arms = {"real": {"training_set.strategy": "real"}, "all": {"training_set.strategy": "upper_bound"}}
    e = experiment(tmp_path / "runs", arms, generator={"path": given_generator(tmp_path / "other")}, **UNMEASURED)
    run = start(e, monkeypatch)
    CliRunner().invoke(cli.app, ["run", "any.yaml", "--dry-run"], catch_exceptions=False)
    assert "sweep: 4 trials done" in run()
