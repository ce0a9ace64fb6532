"""What the page is told of stored artifacts: steps taken, images rendered, validation images, one seed's images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console

from raysynth.core.artifacts import Artifact
from raysynth.core.config import Arm, build_experiment, vary
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import metric_schema, to_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.metrics.calibration import reliability
from raysynth.report import show_answer, write_report
from raysynth.report.answer import answer
from raysynth.report.costs import Made, behind, cost
from raysynth.report.data import ReportData
from raysynth.report.gather import _arms, _fidelity, gather
from raysynth.report.tables import recipes
from raysynth.stages.evaluate import judge_trial
from raysynth.stages.predictions import open_test_sets, predictions_artifact
from raysynth.stages.train_classifier import Trial
from tests.prediction_tables import digits

BUDGET = 60
ARMS: dict[str, dict[str, Any]] = {
    "real": {"steps": (30, 35), "strategy": "real", "n_synth": 0, "validation": 30},
    "x1": {"steps": (60, 60), "strategy": "mix", "n_synth": 30, "validation": 30},
    "x4": {"steps": (60, 60), "strategy": "mix", "n_synth": 120, "validation": 60},
}
"""Real arms stopped early; x1 was rendered first, and its images are among those of x4."""
WHOLE = build_experiment({
    "name": "small", "data": {"kind": "digits", "licence": "CC BY 4.0"},
    "classifier": {"steps": BUDGET, "early_stopping": 1}, "evaluation": {"bootstraps": 100, "findings": ["0", "1"]},
})  # fmt: skip


def classifier(storage: Storage, arm: str, seed: int) -> Artifact:
    """As training leaves it."""
    a = ARMS[arm]
    found = Artifact.at(storage, "train-classifier", "small", 1, {"arm": arm, "seed": seed}, {})
    found.put("validation.parquet", to_parquet(digits(60, seed)))
    row = {"step": a["steps"][seed], "phase": 0, "loss": 0.5, "val_loss": 0.4, "monitor": "auroc", "value": 0.9}
    found.put("log/history.jsonl", json.dumps(row).encode())
    facts = {
        "architecture": "resnet18", "init": "scratch", "strategy": a["strategy"], "ratio": a["n_synth"] / 30,
        "n_real": 30, "n_synth": a["n_synth"], "n_validation": a["validation"], "n_real_generator": None,
        "train_on": None, "n_unseen": 0, "batch_size": 16, "seed_split": 0, "seed_subset": 0, "seed_generator": None,
        "seed_classifier": seed, "notes": [],
    }  # fmt: skip
    views = ["view/small-deleted", view(storage, "train").path]
    found.commit({"steps": a["steps"][seed]}, gpu_seconds=3600, facts=facts, train_seconds=20.0, views=views)
    return found


def view(storage: Storage, name: str) -> Artifact:
    """One that several artifacts read."""
    found = Artifact.at(storage, "view", "small", 1, {"name": name}, {})
    if not found.complete:
        found.commit({"images": 30}, seconds=3.0)
    return found


def generated(storage: Storage, wanted: int) -> Artifact:
    """The selection of one plan's first `wanted` rows, a tenth of a second each."""
    found = Artifact.at(storage, "generate", "small", 1, {"n_synth": wanted}, {"plan": "p"})
    keys = pa.table({"row_key": [f"{i:032x}" for i in range(wanted)]})
    for number, at in enumerate(range(0, wanted, 50)):
        found.put(f"rows/{number:05d}.parquet", to_parquet(keys.slice(at, 50)))
    found.commit({"wanted": wanted, "ok": wanted}, synthetic_set="synthetic-sets/s", render_seconds=wanted / 10)
    return found


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Experiment], Any]:
    """An experiment -> the finished pipeline of all arms; stands for `stages.pipeline.Pipeline`, without Ray."""
    storage = open_storage(str(tmp_path_factory.mktemp("gather")))
    images = Artifact.at(storage, "ingest", "small", 1, {}, {})
    images.put("table.parquet", to_parquet(pa.table({"image_id": ["a", "b"], "split": ["train", "test"]})))
    images.commit({"images": 2, "quarantined": {"broken": 1}})
    sets = open_test_sets(WHOLE, storage, images)
    trials = []
    for arm in ARMS:
        for seed in (0, 1):
            trials.append(Trial(arm, seed, WHOLE, classifier(storage, arm, seed)))
            said = predictions_artifact(trials[-1], sets[0])
            said.put("test.parquet", to_parquet(digits(40 + 10 * len(arm), seed)))
            said.commit({}, gpu_seconds=60, seconds=5.0, views=[view(storage, "test").path])
    evaluated = Artifact.at(storage, "evaluate", "small", 1, {}, {})
    tables = [judge_trial(t, sets, WHOLE.evaluation, "single") for t in trials]
    evaluated.put("metrics.parquet", to_parquet(pa.concat_tables(tables)))
    evaluated.put("comparisons.parquet", to_parquet(pa.table({})))
    evaluated.commit({}, left_out={"seen in training": {"abroad": 1203}})

    def of(name: str) -> tuple[Arm, Any]:
        settings = {"training_set.strategy": ARMS[name]["strategy"]}
        e = vary(WHOLE, settings)
        there = generated(storage, ARMS[name]["n_synth"]) if e.training_set.needs_synthetic else None
        return Arm(name, 0, settings, e), SimpleNamespace(
            experiment=e, images=images, generator=images, plan=images, generated=there
        )

    arms = [of(name) for name in ARMS]
    return lambda e: SimpleNamespace(
        experiment=e, storage=storage, images=images, trials=trials, arm_pipelines=arms, rendered={},
        evaluated=evaluated, measure_fidelity=list,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(pipeline: Callable[[Experiment], Any]) -> ReportData:
    there = pipeline(vary(WHOLE, {"compute.price_per_gpu_hour": 3.0}))
    return gather(there, there.evaluated, [])


def test_arms_are_told_with_the_steps_they_took(data: ReportData) -> None:
    steps = data.metrics.groupby("arm")["gradient_steps"].unique().map(sorted).to_dict()
    assert steps == {"real": [30, 35], "x1": [60], "x4": [60]}
    table = recipes(data)
    assert table
    assert {r[0].text: r[2].text for r in table.rows} == {"real": "30 to 35 of 60", "x1": "60", "x4": "60"}
    (sentence,) = [s for s in answer(data).not_shown if "equal compute" in s]
    assert "from 30 to 60; early stopping ended “real” before all steps were taken" in sentence


def test_repeated_real_images_have_a_ratio_too(tmp_path: Path) -> None:
    """So that the control stands in the curve beside the arm that it controls."""
    storage = open_storage(str(tmp_path))
    trial = Trial("x1", 0, WHOLE, classifier(storage, "x1", 0))
    storage.put(trial.classifier.file("members.parquet"), to_parquet(pa.table({"id": ["a", "b"] * 4})))
    for strategy, ratio in (("duplicate", 3), ("mix", 1)):
        facts = trial.facts | {"strategy": strategy, "ratio": 1 if strategy == "mix" else 0}
        assert _arms(SimpleNamespace(arm_pipelines=[]), [trial], [facts])["ratio"].tolist() == [ratio]


def test_a_set_whose_fidelity_nobody_asked_for_has_none() -> None:
    assert _fidelity([], {"generate/small": SimpleNamespace()}).empty


def test_of_several_selections_the_largest_is_paid(data: ReportData) -> None:
    (row,) = data.cost[data.cost["stage"] == "generate"].to_dict("records")
    assert (row["images"], row["seconds"]) == (120, 12.0)
    trained = data.cost[data.cost["stage"] == "train-classifier"].set_index("arm")["seconds"]
    assert trained.to_dict() == dict.fromkeys(ARMS, 40.0)


def test_the_total_is_the_sum_over_the_artifacts(
    data: ReportData, pipeline: Callable[[Experiment], Any], tmp_path: Path
) -> None:
    """Each once: a view that six classifiers read, images and predictions that two arms share; of deleted ones none."""
    there = pipeline(WHOLE)
    storage = there.storage
    paths = [e.path for e in storage.list() if e.path.endswith("run.json")]
    made = [p for p in paths if not p.startswith(("report", "evaluate"))] + [there.evaluated.file("run.json")]
    own = [r for r in (json.loads(storage.get(p)) for p in made) if r["counts"].get("wanted") != 30]
    seconds = [r.get("train_seconds") or r.get("render_seconds") or r["seconds"] for r in own]
    assert data.cost["seconds"].sum() == pytest.approx(sum(seconds))
    gpu_seconds = data.cost["gpu_seconds"].sum()
    assert gpu_seconds == sum(r["gpu_seconds"] for r in own) == 6 * 3600 + 4 * 60
    assert data.cost["cost"].sum() == pytest.approx(gpu_seconds / 3600 * 3)
    by_stage = data.cost.groupby("stage", sort=False)["seconds"].sum().to_dict()
    assert (by_stage["view"], by_stage["predictions"]) == (6.0, 20.0)
    assert list(by_stage) == ["ingest", "view", "generate", "train-classifier", "predictions", "evaluate"]
    fidelity = Artifact.at(open_storage(str(tmp_path)), "fidelity", "small", 1, {}, {})
    fidelity.commit({}, gpu_seconds=7, seconds=9.0)
    more = cost(behind(there, there.evaluated, [fidelity]), None).set_index("stage")
    assert (more["seconds"]["fidelity"], more["gpu_seconds"]["fidelity"]) == (9.0, 7.0)


def test_a_row_of_two_plans_is_paid_once(tmp_path: Path) -> None:
    storage, made = open_storage(str(tmp_path)), []
    for plan, keys in (("p", range(4)), ("q", range(3, 9))):
        a = Artifact.at(storage, "generate", "small", 1, {}, {"plan": plan})
        a.put("rows/00000.parquet", to_parquet(pa.table({"row_key": [f"{i:032x}" for i in keys]})))
        n = len(keys)
        a.commit({"wanted": n, "ok": n}, gpu_seconds=n, synthetic_set="synthetic-sets/s", render_seconds=n)
        made.append(Made("generate", "", a, a.run_info()))
    (row,) = cost(made, None).to_dict("records")
    assert (row["images"], row["seconds"], row["gpu_seconds"]) == (9, 9.0, 9.0)


def test_validation_images_of_every_arm(data: ReportData) -> None:
    assert any("chosen on 30 to 60 real validation images an arm, which" in note for note in data.notes)
    assert "Test set “abroad”: 1,203 images seen in training are left out of every metric." in data.notes


def test_reliability_counts_an_image_once_a_seed(data: ReportData) -> None:
    table = data.reliability
    assert set(table.groupby(["arm", "seed", "finding"])["n"].sum()) == {600}
    mine = table[(table["arm"] == "x4") & (table["seed"] == 1) & (table["finding"] == "3")]
    own = reliability(digits(60, 1), "3").to_pandas()
    np.testing.assert_array_equal(mine["ci_low"], own["ci_low"])
    np.testing.assert_array_equal(mine["ci_high"], own["ci_high"])


def test_the_page_follows_what_it_shows(pipeline: Callable[[Experiment], Any], tmp_path: Path) -> None:
    first = write_report(pipeline(WHOLE))

    def page(e: Experiment) -> Artifact:
        report = write_report(pipeline(e))
        assert write_report(pipeline(e)).path == report.path
        return report

    priced = page(vary(WHOLE, {"compute.price_per_gpu_hour": 3.0}))
    assert priced.path != first.path
    costs = pd.read_csv(io.BytesIO(priced.storage.get(priced.file("cost.csv"))))
    assert costs.loc[costs["stage"] == "train-classifier", "cost"].tolist() == [6.0] * 3
    licensed = page(vary(WHOLE, {"data.licence": "CC0"}))
    assert licensed.path != first.path
    assert "Licence: CC0" in licensed.storage.get(licensed.file("index.html")).decode()
    elsewhere = replace(WHOLE, root=str(tmp_path), compute=replace(WHOLE.compute, trial_cpus=2))
    assert page(elsewhere).path == first.path


@pytest.mark.parametrize(("seeds", "values", "auroc"), [
    ((0, 1), {"macro": 0.9}, "0.900 (0.014)"),
    ((0,), {"macro": 0.9}, "0.890"),
    ((0,), {"macro": np.nan, "macro without 0": 0.9}, "0.890"),
    ((0, 1), {"macro": np.nan, "macro without 0": 0.9}, "0.900 (0.014)"),
    ((0, 1), {"macro": np.nan, "macro without 0, 1": np.nan}, "-"),
])  # fmt: skip
def test_the_table_at_the_end_of_a_run(
    pipeline: Callable[[Experiment], Any], monkeypatch: pytest.MonkeyPatch, seeds: tuple[int, ...],
    values: dict[str, float], auroc: str,
) -> None:  # fmt: skip
    """Where a finding is withheld, the average of the others stands in its place, as on the page."""
    shared = {"arm": "real", "subgroup": "", "test_set": "test", "metric": "auroc", "n_real": 1200, "n_synth": 0}
    metrics = pd.DataFrame([
        {**shared, "run": f"r{seed}", "finding": name, "value": value + 0.02 * seed - 0.01}
        for seed in seeds for name, value in values.items()
    ]).reindex(columns=metric_schema().names)  # fmt: skip
    there = pipeline(WHOLE)
    evaluated = Artifact.at(there.storage, "evaluate", "small", 1, {"seeds": list(seeds), "values": str(values)}, {})
    evaluated.put("metrics.parquet", to_parquet(pa.Table.from_pandas(metrics, metric_schema(), preserve_index=False)))
    evaluated.put("comparisons.parquet", to_parquet(pa.table({})))
    evaluated.commit({})
    there.evaluated = evaluated
    screen = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr("raysynth.report.gather.console", screen)
    show_answer(there, evaluated)
    lines = [" ".join(line.split()) for line in screen.file.getvalue().splitlines()]
    assert "arm real synthetic auroc seeds" in lines
    assert f"real 1,200 0 {auroc} {len(seeds)}" in lines
