"""From a training set to the page on real Ray: one classifier by two processes, an external test set, the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
from PIL import Image

from raysynth.core.artifacts import Artifact
from raysynth.core.config import vary
from raysynth.core.errors import DataError, EnvironmentFault
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import from_parquet, metric_schema, predictions_schema
from raysynth.report import write_report
from raysynth.stages.pipeline import Pipeline, stages_of
from raysynth.stages.predictions import load_predictions, open_test_sets, predictions_artifact
from raysynth.stages.sweep_table import SweepTable
from tests.digits import CLASSES, digit_images

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of another hospital: one folder a class, twelve images each, and an eleventh class of one image, which
    nobody trained on and no split could do without."""
    place = tmp_path_factory.mktemp("elsewhere")
    images, labels = digit_images()
    for label in CLASSES:
        (place / label).mkdir()
        for i in np.flatnonzero(labels == int(label))[:12]:
            Image.fromarray(255 - images[i, ..., 0]).save(place / label / f"{i}.png")
    (place / "letter").mkdir()
    Image.fromarray(images[0, ..., 0].T.copy()).save(place / "letter" / "a.png")
    return place


@pytest.fixture(scope="module")
def experiment(elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    place = tmp_path_factory.mktemp("evaluate")
    return vary(Experiment(name="digits", root=str(place / "runs")), {
        "data.kind": "digits", "data.image": {"size": 8, "channels": "grey"}, "training_set.strategy": "real",
        "training_set.n_per_class": 20, "evaluation.bootstraps": 100, "compute.cache": str(place / "cache"),
        "classifier": {"architecture": "resnet10t", "arguments": {"channels": [8, 8, 16, 16]}, "steps": 60, "lr": 3e-3,
                       "batch_size": 32, "validate_every": 30, "class_weights": "balanced"},
        "evaluation.test_sets": {"elsewhere": {"kind": "class_folders", "path": str(elsewhere)}},
    })  # fmt: skip


@pytest.fixture(scope="module")
def done(ray_session: None, experiment: Experiment) -> Pipeline:
    """One classifier, judged on both test sets."""
    pipeline = Pipeline(experiment)
    for stage in stages_of(experiment):
        pipeline.do(stage)
    return pipeline


def metrics(pipeline: Pipeline) -> pd.DataFrame:
    return from_parquet(pipeline.storage.get(pipeline.evaluated.file("metrics.parquet"))).to_pandas()


def test_stages_without_synthetic_images(experiment: Experiment) -> None:
    assert stages_of(experiment) == ["ingest", "train-classifier", "evaluate"]
    assert stages_of(vary(experiment, {"training_set.strategy": "mix"}))[1:4] == ["train-generator", "plan", "generate"]
    assert stages_of(vary(experiment, {"sweep.seeds": [0, 1]})) == ["ingest", "sweep", "evaluate"]


def test_test_sets_are_ingested_first(ray_session: None, experiment: Experiment, tmp_path: Path) -> None:
    """Not after days of training: what is wrong with them is told at once, with their key."""
    (tmp_path / "folder").mkdir()
    broken = {"evaluation.test_sets": {"empty": {"kind": "class_folders", "path": str(tmp_path / "folder")}}}
    pipeline = Pipeline(vary(experiment, {"root": str(tmp_path / "runs"), **broken}))
    with pytest.raises(DataError, match=r"evaluation\.test_sets\.empty\.path: got .*folder"):
        pipeline.do("ingest")
    assert pipeline.images.complete
    whole = Pipeline(vary(experiment, {"root": str(tmp_path / "runs")}))
    whole.do("ingest")
    names = [t.name for t in open_test_sets(whole.experiment, whole.storage, whole.images)]
    assert names == ["test", "elsewhere"]


def test_predictions_are_stored_once_for_every_test_set(done: Pipeline) -> None:
    sets = open_test_sets(done.experiment, done.storage, done.images)
    found = [load_predictions(done.trials[0], t) for t in sets]
    assert [t.num_rows for t in found] == [450, 121]
    for table, judged in zip(found, (450, 120), strict=True):
        assert table.schema.names == predictions_schema(CLASSES, []).names
        probabilities = np.stack([table[f"prob_{c}"].to_numpy() for c in CLASSES], axis=1)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
        for c in CLASSES:
            assert len(table) - table[f"true_{c}"].null_count == judged
        assert sum(np.nansum(table[f"true_{c}"].to_numpy()) for c in CLASSES) == judged
    told = done.evaluated.run_info()
    assert told["counts"]["test_images"] == 570
    assert told["left_out"] == {"seen in training": {}, "of no class that was trained": {"elsewhere": 1}}
    before = {entry.path: entry for entry in done.storage.list("predictions")}
    # Another number of resamplings judges the same predictions.
    other = Pipeline(vary(done.experiment, {"evaluation.bootstraps": 120}))
    other.do("evaluate")
    assert other.evaluated.path != done.evaluated.path
    assert {entry.path: entry for entry in done.storage.list("predictions")} == before
    # A test set more is all that is predicted.
    section = done.experiment.evaluation.test_sets["elsewhere"]
    more = Pipeline(vary(done.experiment, {"evaluation.test_sets": {"mars": section}}))
    more.do("evaluate")
    after = {entry.path: entry for entry in done.storage.list("predictions")}
    assert {path: entry for path, entry in after.items() if path in before} == before
    mars = predictions_artifact(more.trials[0], open_test_sets(more.experiment, more.storage, more.images)[2])
    added = {path.removeprefix(f"{mars.path}/") for path in after.keys() - before.keys()}
    assert added == {"mars.parquet", "config.yaml", "run.json", "_SUCCESS"}
    assert set(metrics(more)["test_set"]) == {"test", "elsewhere", "mars"}


def test_the_metric_table(done: Pipeline) -> None:
    table = metrics(done)
    assert list(table.columns) == metric_schema().names
    whole = table[(table["finding"] == "macro") & (table["subgroup"] == "")].set_index(["test_set", "metric"])["value"]
    assert whole["test", "accuracy"] > 0.3  # chance is 0.1
    # White digits on black are read by a classifier that never saw them only by chance.
    assert whole["elsewhere", "accuracy"] < whole["test", "accuracy"]
    assert set(table["n_real"]) == {200}
    assert set(table["strategy"]) == {"real"}
    assert set(table["gradient_steps"]) == {60}
    assert table["threshold"].notna().any()


def test_trials_of_two_processes_train_side_by_side_on_every_cpu(
    done: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train inside Ray Tune, where nothing is left for a trial that would hold a CPU beside those of its processes:
    same artifact, same validation metric as of one process on the global batch."""
    changes = {"root": str(tmp_path), "compute.classifier_workers": 2, "sweep.seeds": [0, 1]}
    two = Pipeline(vary(done.experiment, changes))
    groups: list[int] = []
    told = SweepTable.reported

    def reported(self: SweepTable, number: int, result: dict) -> None:
        told(self, number, result)
        held = [g["bundles"] for g in ray.util.placement_group_table().values() if g["state"] == "CREATED"]
        groups.append(sum(list(bundles.values()) == [{"CPU": 1.0}] * 2 for bundles in held))

    monkeypatch.setattr(SweepTable, "reported", reported)
    two.do("ingest")
    two.do("sweep")
    assert max(groups) == 2
    artifact = two.trials[0].classifier
    assert artifact.fp == done.classifier.fp
    for row, other in zip(history(artifact), history(done.classifier), strict=True):
        assert row["step"] == other["step"]
        np.testing.assert_allclose([row["loss"], row["val_loss"]], [other["loss"], other["val_loss"]], rtol=2e-3)


def history(artifact: Artifact) -> list[dict]:
    return [json.loads(row) for row in artifact.storage.get(artifact.file("log/history.jsonl")).decode().splitlines()]


def test_the_page_of_one_classifier(done: Pipeline) -> None:
    report = write_report(done)
    page = report.storage.get(report.file("index.html")).decode()
    assert "elsewhere" in page
    assert "450" in page
    assert write_report(done).path == report.path
    table = pd.read_csv(Path(report.storage.root) / report.file("metrics.csv"))
    assert len(table) == len(metrics(done))


def test_what_is_missing_is_said_without_starting_anything(experiment: Experiment, tmp_path: Path) -> None:
    fresh = Pipeline(vary(experiment, {"root": str(tmp_path)}))
    assert fresh.found()["evaluate"] is None
    with pytest.raises(EnvironmentFault, match="Run `raysynth ingest`"):
        fresh.artifact("train-classifier")
