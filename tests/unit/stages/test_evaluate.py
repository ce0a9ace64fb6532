"""Judging and comparing on stored predictions: thresholds, pairing, adjustment, whose label policy. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.metrics import f1_score

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment, vary
from raysynth.core.errors import DataError
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.metrics.comparisons import holm
from raysynth.metrics.thresholds import choose_thresholds
from raysynth.stages import predictions as stage
from raysynth.stages.evaluate import (
    COMPARED,
    Contrast,
    compare_pair,
    comparison_table,
    contrasts,
    evaluate,
    evaluate_artifact,
    judge_trial,
    require_one_test_split,
)
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.predictions import load_predictions, open_test_sets, predictions_artifact, thresholds_of
from raysynth.stages.sweep_plan import detectable
from raysynth.stages.train_classifier import Trial
from tests.prediction_tables import drawn

PRIMARY = {"arm": "mix", "against": "real", "metric": "f1"}
ARMS = {"real": {"training_set.strategy": "real"}, "twice": {"training_set.strategy": "duplicate"},
        "mix": {"training_set.ratio": 1}}  # fmt: skip


def experiment(root: Path, labels: dict[str, Any] | None = None, **evaluation: Any) -> Experiment:
    return build_experiment({
        "name": "e", "root": str(root), "data": {"kind": "digits", "labels": {"kind": "multi", **(labels or {})}},
        "classifier": {}, "evaluation": {"bootstraps": 100, **evaluation}, "sweep": {"arms": ARMS, "seeds": [0, 1, 2]},
    })  # fmt: skip


def ingested(storage: Storage, name: str, table: pa.Table | None = None) -> Artifact:
    artifact = Artifact.at(storage, "ingest", name, 1, {}, {})
    artifact.put("table.parquet", to_parquet(table if table is not None else pa.table({"image_id": ["i"]})))
    artifact.commit({"patients_by": "column"})
    return artifact


def shifted(table: pa.Table, factor: float) -> pa.Table:
    """The same ranking with every probability times `factor`: the best threshold moves with it."""
    for i, name in enumerate(table.column_names):
        if name.startswith("prob_"):
            table = table.set_column(i, table.schema.field(i), pa.array(table[name].to_numpy() * np.float32(factor)))
    return table


def trained(e: Experiment, arm: str, seed: int, sets: Sequence[stage.TestSet], signal: float = 1) -> Trial:
    """A classifier that was never trained, and what it said: on validation half as loud as on the test sets."""
    storage = open_storage(e.root)
    changed = build_experiment({"name": "e", "data": {"kind": "digits"}, "training_set": {
        "strategy": ARMS[arm].get("training_set.strategy", "mix")}})  # fmt: skip
    trial = Trial(arm, seed, changed, Artifact.at(storage, "train-classifier", "c", 1, {"arm": arm, "seed": seed}, {}))
    noise = seed + 10 * list(ARMS).index(arm)
    trial.classifier.put("validation.parquet", to_parquet(shifted(drawn(signal=signal, seed=100 + noise), 0.5)))
    trial.classifier.commit({"steps": 7}, facts={"strategy": changed.training_set.strategy})
    for t in sets:
        said = predictions_artifact(trial, t)
        table = drawn(signal=signal, seed=noise, test_set=[t.name] * 300)
        said.put(f"{t.name}.parquet", to_parquet(table))
        said.commit({})
    return trial


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, list[Trial], list[stage.TestSet]]:
    """Three arms with three seeds each, in no order, on two test sets; one arm lacks a seed."""
    e = experiment(tmp_path_factory.mktemp("evaluate"), primary=PRIMARY)
    storage = open_storage(e.root)
    sets = [stage.TestSet(name, ingested(storage, name), e, []) for name in ("test", "mars")]
    signals = {"real": (0.2, 1.2, 0.6), "mix": (0.4, 2.0, 0.8), "twice": (0.3, 1.0)}
    trials = [trained(e, arm, s, sets, x) for arm, found in signals.items() for s, x in enumerate(found)]
    return e, [trials[i] for i in (4, 2, 6, 0, 7, 5, 1, 3)], sets


def f1(trial: Trial, test_set: stage.TestSet) -> float:
    """Macro F1 by scikit-learn, at thresholds chosen on the validation predictions."""
    files = trial.classifier.storage
    cuts = choose_thresholds(from_parquet(files.get(trial.classifier.file("validation.parquet"))), "youden")
    said = load_predictions(trial, test_set)
    values = []
    for name, cut in cuts.items():
        known = said.filter(said[f"true_{name}"].is_valid())
        values.append(f1_score(known[f"true_{name}"].to_numpy(), known[f"prob_{name}"].to_numpy() >= cut))
    return float(np.mean(values))


def test_thresholds_are_those_of_validation(judged: tuple[Experiment, list[Trial], list[stage.TestSet]]) -> None:
    e, trials, sets = judged
    trial = trials[0]
    chosen = thresholds_of(trial, e.evaluation)
    assert max(chosen.values()) <= 0.5, "validation probabilities are at most a half"
    table = judge_trial(trial, sets, e.evaluation, "multi").to_pandas()
    own = table[(table["metric"] == "f1") & (table["finding"] != "macro")]
    assert {(r.finding, r.threshold) for r in own.itertuples()} == set(chosen.items())
    whole = table[(table["metric"] == "f1") & (table["finding"] == "macro") & (table["subgroup"] == "")]
    assert dict(zip(whole["test_set"], whole["value"])) == {t.name: pytest.approx(f1(trial, t)) for t in sets}
    assert set(table["arm"]) == {trial.arm}
    assert set(table["gradient_steps"]) == {7}


def test_seeds_are_paired_and_thresholds_frozen(judged: tuple[Experiment, list[Trial], list[stage.TestSet]]) -> None:
    e, trials, sets = judged
    by = {(t.arm, t.seed): f1(t, sets[0]) for t in trials}
    for arm, against, seeds in (("mix", "real", (0, 1, 2)), ("twice", "real", (0, 1)), ("mix", "twice", (0, 1))):
        contrast = next(c for c in contrasts(e, trials, sets)
                        if (c.arm, c.against, c.test_set) == (arm, against, "test"))  # fmt: skip
        assert [(a.seed, b.seed) for a, b in contrast.pairs] == [(s, s) for s in seeds]
        found = next(r for r in compare_pair(contrast, sets[0], e.evaluation, "multi")
                     if (r["metric"], r["subgroup"]) == ("f1", ""))  # fmt: skip
        differences = [by[arm, s] - by[against, s] for s in seeds]
        assert found["seeds"] == len(seeds)
        assert found["difference"] == pytest.approx(np.mean(differences))
        assert found["sd_seeds"] == pytest.approx(np.std(differences, ddof=1))


def test_one_contrast_is_primary_and_the_others_are_adjusted(
    judged: tuple[Experiment, list[Trial], list[stage.TestSet]],
) -> None:
    e, trials, sets = judged
    asked = contrasts(e, trials, sets)
    pairs = {("mix", "real"), ("twice", "real"), ("mix", "twice")}
    assert {(c.arm, c.against, c.test_set) for c in asked} == {(*p, t.name) for p in pairs for t in sets}
    named = {t.name: t for t in sets}
    frame = comparison_table(asked, [compare_pair(c, named[c.test_set], e.evaluation, "multi") for c in asked])
    primary = frame[frame["primary"]]
    assert primary[["arm", "against", "test_set", "metric", "subgroup"]].values.tolist() == [
        ["mix", "real", "test", "f1", ""]
    ]
    assert (primary["p_holm"] == primary["p"]).all(), "the one confirmatory test is not adjusted"
    grouped = frame[frame["subgroup"] != ""]
    assert set(grouped["subgroup"]) == {"sex=F", "sex=M"}
    assert set(zip(grouped["arm"], grouped["metric"], grouped["test_set"])) == {("mix", "f1", "test")}
    for t in sets:
        for metric in COMPARED:
            family = frame[(frame["test_set"] == t.name) & (frame["metric"] == metric) & ~frame["primary"]]
            own = (t.name, metric) == ("test", "f1")
            assert len(family) == (4 if own else 3)  # of the primary pair, its two subgroups instead of everyone
            assert family["p_holm"].tolist() == holm(family["p"].tolist())


def test_holms_numbers() -> None:
    def row(p: float | None, test_set: str = "test", metric: str = "f1", subgroup: str = "") -> dict[str, Any]:
        return {"test_set": test_set, "metric": metric, "subgroup": subgroup, "p": p}

    asked = [Contrast("mix", "real", "test", [], "f1"), Contrast("twice", "real", "test", [], None),
             Contrast("mix", "real", "mars", [], None)]  # fmt: skip
    found = comparison_table(asked, [
        [row(0.01), row(0.02, metric="auroc"), row(0.03, subgroup="sex=F")],
        [row(0.02), row(0.03, metric="auroc"), row(None, metric="accuracy")],
        [row(0.02, "mars"), row(0.04, "mars", "auroc"), row(None, "mars", "accuracy")],
    ])  # fmt: skip
    expected = [0.01, 0.04, 0.04, 0.04, 0.04, None, 0.02, 0.04, None]
    assert [None if pd.isna(p) else p for p in found["p_holm"]] == [
        None if p is None else pytest.approx(p) for p in expected
    ]
    assert found["primary"].tolist() == [True] + [False] * 8
    assert comparison_table([], []).empty


def test_a_primary_arm_that_was_not_trained_is_named(
    judged: tuple[Experiment, list[Trial], list[stage.TestSet]],
) -> None:
    e, trials, sets = judged
    with pytest.raises(DataError, match=r"evaluation.primary.against: got 'real', must be one of mix, twice"):
        contrasts(e, [t for t in trials if t.arm != "real"], sets)


@pytest.mark.parametrize(("own", "apart"), [
    ({}, None),
    ({"i2": ("train", "p9")}, None),
    ({"i1": ("train", "p1")}, "1 images of test patients, such as i1, in another split"),
    ({"i1": ("val", "p7")}, "such as i1,"),
    ({"i1": None}, "such as i1,"),
    ({"i2": ("train", "p0")}, "1 images of test patients, such as i2,"),
])  # fmt: skip
def test_no_trial_may_hold_the_test_images_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, tuple[str, str] | None], apart: str | None
) -> None:
    """Two test images, and one to train on: `own` is where they are among the images of an arm that stores others."""
    e = experiment(tmp_path)
    storage = open_storage(e.root)
    known: dict[str, tuple[str, str] | None] = {"i0": ("test", "p0"), "i1": ("test", "p1"), "i2": ("train", "p2")}

    def images(name: str, rows: dict[str, tuple[str, str] | None]) -> Artifact:
        there = [{"image_id": i, "split": row[0], "patient_id": row[1]} for i, row in rows.items() if row]
        artifact = Artifact.at(storage, "ingest", name, 1, {"name": name}, {})
        artifact.put("table.parquet", to_parquet(pa.Table.from_pylist(there)))
        artifact.commit({})
        return artifact

    base, other = images("base", known), images("arm", known | own)
    arm = vary(e, {"data.image.size": 16})
    found = {e.data.image: base, arm.data.image: other}
    monkeypatch.setattr("raysynth.stages.evaluate.ingest_artifact", lambda x, _: (found[x.data.image], None))
    classifier = Artifact.at(storage, "train-classifier", "c", 1, {}, {})
    policy = vary(e, {"data.labels.policy": {"1": "ones"}})
    trials = [Trial(n, 0, x, classifier) for n, x in {"real": e, "ones": policy, "small": arm}.items()]
    require_one_test_split(e, storage, base, trials[:2])
    if apart is None:
        require_one_test_split(e, storage, base, trials)
        return
    with pytest.raises(DataError, match=rf"data of the arm small: got .*{apart}.*data\.split\.keep=.*ingest/base-"):
        evaluate(e, storage, base, trials)


def raw(n: int = 100) -> pa.Table:
    """Images of which c0 is known in half, c1 in all."""
    known = np.arange(n) % 2 == 0
    return pa.table({
        "image_id": [f"i{i:03d}" for i in range(n)], "split": ["test"] * n, "patient_id": pa.nulls(n, pa.string()),
        "site": ["a"] * n, "dataset": ["e"] * n, "pixel_sha256": [f"x{i}" for i in range(n)],
        "label_c0": pa.array(np.where(known, np.arange(n) % 4 // 2, -1), pa.int8()),
        "label_c1": pa.array(np.arange(n) % 5 == 0).cast(pa.int8()),
    })  # fmt: skip


def policies(
    place: Path, monkeypatch: pytest.MonkeyPatch, own: str, external: str | None, test_set: str = "test"
) -> tuple[Experiment, Artifact]:
    """An experiment with these policies of c0 whose test split and external test set are the same `raw` images."""
    section: dict[str, Any] = {} if external is None else {"labels": {"policy": {"c0": external}}}
    primary = {**PRIMARY, "test_set": test_set}
    e = experiment(place, {"policy": {"c0": own}}, test_sets={"mars": section}, primary=primary)
    images = ingested(open_storage(e.root), "own", raw())
    open_storage(e.root).put(images.file("vocabulary.json"), b'{"classes": ["c0", "c1"]}')
    for module in ("predictions", "pipeline"):
        monkeypatch.setattr(f"raysynth.stages.{module}.ingest_artifact", lambda *_, **__: (images, None))
    return e, images


class Viewed:
    """The view of `raw`; its pixels are their positions."""

    index = raw()

    def __len__(self) -> int:
        return self.index.num_rows

    def images(self, positions: range) -> range:
        return positions


@pytest.mark.parametrize(("external", "positives"), [(None, 75), ("zeros", 25), ("ones", 75), ("ignore", 25)])
def test_each_test_set_has_its_own_label_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: str | None, positives: int
) -> None:
    e, images = policies(tmp_path, monkeypatch, "ones", external)
    storage = open_storage(e.root)
    sets = open_test_sets(e, storage, images)
    classifier = Artifact.at(storage, "train-classifier", "c", 1, {}, {})
    classifier.commit({})
    trial = Trial("mix", 0, e, classifier)
    facts = {"classes": ["c0", "c1"], "kind": "multi"}
    said = SimpleNamespace(facts=facts, predict=lambda at: np.zeros((len(at), 2), np.float32))
    monkeypatch.setattr("raysynth.models.classifier_export.load_classifier", lambda *_: said)
    monkeypatch.setattr(stage, "local_folder", lambda *_: "")
    monkeypatch.setattr(stage, "open_view_folder", lambda *_: Viewed())
    stage.predict(storage, "model", [(predictions_artifact(trial, t), "") for t in sets], str(tmp_path), gpus=0)
    found = {t.name: load_predictions(trial, t)["true_c0"] for t in sets}
    assert found["test"].to_pylist().count(1) == 75
    assert found["mars"].to_pylist().count(1) == positives
    assert found["mars"].null_count == (50 if external == "ignore" else 0)


def test_a_label_policy_gives_other_predictions_and_another_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[set[str]] = [set(), set()]
    judgements = set()
    for own, external in (("ignore", None), ("zeros", None), ("ones", None), ("ones", "zeros"), ("zeros", "ignore")):
        e, images = policies(tmp_path, monkeypatch, own, external)
        storage = open_storage(e.root)
        sets = open_test_sets(e, storage, images)
        # Where train and validation have no unknown label, each policy trains the same bytes.
        classifier = Artifact.at(storage, "train-classifier", "c", 1, {"policy": own}, {})
        classifier.commit({})
        trials = [Trial("mix", 0, e, classifier)]
        for found, t in zip(said, sets, strict=True):
            found.add(predictions_artifact(trials[0], t).fp)
        judgements.add(evaluate_artifact(e, storage, trials, sets).fp)
    assert [len(found) for found in (*said, judgements)] == [3, 3, 5], "each set follows its own policy"
    asked = [predictions_artifact(trials[0], t).identity["config"] for t in sets]
    assert asked == [{"test_set": "test", "policy": {"c0": "zeros"}}, {"test_set": "mars", "policy": {}}]


@pytest.mark.parametrize(("test_set", "negatives"), [("test", 25), ("mars", 75)])
def test_the_smallest_difference_follows_the_policy_of_its_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, test_set: str, negatives: int
) -> None:
    e, _ = policies(tmp_path, monkeypatch, "ones", "zeros", test_set)
    found = detectable(Pipeline(e), e)
    assert found is not None
    assert found.n_neg[0] == negatives
