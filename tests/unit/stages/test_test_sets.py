"""External test sets whose classes are not those of the classifiers: what is judged, said and refused. No Ray."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.errors import DataError, NotReady
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import to_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.data.predictions import truth
from raysynth.stages import predictions as stage
from raysynth.stages.evaluate import evaluate_artifact, judge_trial
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.predictions import ingest_test_sets, load_predictions, open_test_sets, predictions_artifact
from raysynth.stages.sweep_plan import detectable
from raysynth.stages.train_classifier import Trial

KNOWN = ["benign", "malignant"]


def table(classes: list[str], each: int = 12, split: str = "test") -> pa.Table:
    """`each` images of each class, one after the other."""
    n = each * len(classes)
    return pa.table({
        "image_id": [f"i{i:03d}" for i in range(n)], "split": [split] * n, "patient_id": [f"p{i}" for i in range(n)],
        "site": ["a"] * n, "dataset": ["own"] * n, "pixel_sha256": [f"x{i}" for i in range(n)],
        **{f"label_{c}": pa.array(np.arange(n) // each == j).cast(pa.int8()) for j, c in enumerate(classes)},
    })  # fmt: skip


def images(storage: Storage, name: str, rows: pa.Table, classes: list[str]) -> Artifact:
    found = Artifact.at(storage, "ingest", name, 1, {"name": name}, {})
    found.put("table.parquet", to_parquet(rows))
    found.put("vocabulary.json", json.dumps({"classes": classes}).encode())
    found.commit({"patients_by": "column"})
    return found


def judged_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, sets: dict[str, list[str]], kind: str = "single"
) -> tuple[Experiment, Storage, Artifact]:
    """An experiment that knows KNOWN, tested also on sets of these classes; all is ingested."""
    e = build_experiment({
        "name": "own", "root": str(root), "data": {"kind": "digits", "labels": {"kind": kind}}, "classifier": {},
        "evaluation": {"bootstraps": 100, "test_sets": {name: {} for name in sets}, "primary": {
            "test_set": next(iter(sets), "test")}},
    })  # fmt: skip
    storage = open_storage(e.root)
    found = {"own": images(storage, "own", table(KNOWN), KNOWN)}
    found |= {f"own-{name}": images(storage, name, table(classes), classes) for name, classes in sets.items()}
    for module in ("predictions", "pipeline"):
        monkeypatch.setattr(f"raysynth.stages.{module}.ingest_artifact", lambda x, *_, **__: (found[x.name], None))
    return e, storage, found["own"]


class Views:
    """The view of each set, by its folder; a picture is its row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "single") -> None:
        self.predicted: list[str] = []
        self.index: dict[str, pa.Table] = {}
        self.facts = {"classes": KNOWN, "kind": kind}
        monkeypatch.setattr("raysynth.models.classifier_export.load_classifier", lambda *_: self)
        monkeypatch.setattr(stage, "local_folder", lambda *_: "")
        monkeypatch.setattr(stage, "open_view_folder", self.open)

    def open(self, storage: Storage, folder: str, cache: str) -> Any:
        self.predicted.append(folder)

        class View(SimpleNamespace):
            def __len__(self) -> int:
                return self.index.num_rows

        return View(index=self.index[folder], images=np.asarray)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """The first class, surely."""
        return np.tile(np.float32([1, 0]), (len(rows), 1))


def trained(e: Experiment, storage: Storage) -> Trial:
    trial = Trial("real", 0, e, Artifact.at(storage, "train-classifier", "c", 1, {}, {}))
    said = truth(table(KNOWN, split="val"), "val", KNOWN, {}, "single")
    said = stage.with_probabilities(said, np.tile([0.5, 0.5], (24, 1)), KNOWN)
    trial.classifier.put("validation.parquet", to_parquet(said))
    trial.classifier.commit({"steps": 7}, facts={})
    return trial


def test_images_of_a_class_that_nobody_knows_are_left_out_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    e, storage, own = judged_on(tmp_path, monkeypatch, {"mars": [*KNOWN, "nevus", "other"]})
    ingest_test_sets(e, storage, own, pytest.fail)
    told = " ".join(capsys.readouterr().out.split())
    assert "test set mars: 24 of 48 images cannot be judged and are left out of every metric; of classes that " in told
    assert "not trained on: nevus 12, other 12" in told

    views, trial, sets = Views(monkeypatch), trained(e, storage), open_test_sets(e, storage, own)
    views.index = {"test": table(KNOWN), "mars": table([*KNOWN, "nevus", "other"])}
    missing = [(predictions_artifact(trial, t), t.name) for t in sets]
    stage.predict(storage, "model", missing, str(tmp_path), gpus=0)
    assert [a.run_info()["counts"] for a, _ in missing] == [
        {"images": 24, "judged": 24}, {"images": 48, "judged": 24},
    ]  # fmt: skip
    said = load_predictions(trial, sets[1])
    assert said["true_benign"].to_pylist() == [1] * 12 + [0] * 12 + [None] * 24
    assert said["prob_benign"].to_pylist() == [1] * 48, "what was said of them is stored all the same"
    metrics = judge_trial(trial, sets, e.evaluation, "single").to_pandas().astype(str).set_index("test_set")
    assert metrics.loc["test"].values.tolist() == metrics.loc["mars"].values.tolist()


def test_the_smallest_difference_counts_images_that_can_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, _, _ = judged_on(tmp_path, monkeypatch, {"mars": [*KNOWN, "other"]})
    found = detectable(Pipeline(e), e)
    assert found is not None
    assert (found.findings, found.n_pos, found.n_neg) == (KNOWN, [12, 12], [12, 12])


@pytest.mark.parametrize(("kind", "one"), [("single", ", one an image"), ("multi", "")])
def test_a_set_of_which_nothing_can_be_judged_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, one: str
) -> None:
    e, storage, own = judged_on(tmp_path, monkeypatch, {"mars": ["gutartig", "other"]}, kind)
    refused = (
        rf"evaluation\.test_sets\.mars\.labels\.classes: got 'gutartig, other', must be some of those of "
        rf"`data` \(benign, malignant\){one}\. None of its images could be judged\. Give its classes the names"
    )
    with pytest.raises(DataError, match=refused):
        ingest_test_sets(e, storage, own, pytest.fail)


def test_a_finding_that_nobody_knows_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several findings an image's others are absent all the same."""
    e, storage, own = judged_on(tmp_path, monkeypatch, {"mars": [*KNOWN, "other"]}, "multi")
    ingest_test_sets(e, storage, own, pytest.fail)
    assert "mars" not in capsys.readouterr().out
    assert truth(table([*KNOWN, "other"]), "mars", KNOWN, {}, "multi")["true_benign"].to_pylist() == [1] * 12 + [0] * 24


def trained_on(root: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> tuple[Experiment, Storage, Artifact]:
    """An experiment of 16 train, 4 val and 4 test images, tested on `same`, all of these, and `mars`, 24 others."""
    e = build_experiment({
        "name": "own", "root": str(root), "data": {"kind": "digits"}, "classifier": {},
        "evaluation": {"bootstraps": 100, "min_positives": 2, "primary": {"test_set": "same"},
                       "test_sets": {"same": {}, "mars": {"kind": "digits", "path": "m"}}}, **sections,
    })  # fmt: skip
    storage, own = open_storage(e.root), table(KNOWN)
    other = own.set_column(own.schema.get_field_index("pixel_sha256"), "pixel_sha256", [[f"m{i}" for i in range(24)]])
    split = ["val" if i % 6 == 4 else "test" if i % 6 == 5 else "train" for i in range(24)]
    rows = {"own-same": own, "own-mars": other, "own": own.set_column(1, "split", [split])}
    found = {name: images(storage, name, t, KNOWN) for name, t in rows.items()}
    for module in ("predictions", "pipeline"):
        monkeypatch.setattr(f"raysynth.stages.{module}.ingest_artifact", lambda x, *_, **__: (found[x.name], None))
    return e, storage, found["own"]


def given_generator(root: Path, *pixels: str) -> str:
    found = Artifact.at(open_storage(str(root)), "train-generator", "g", 2, {"pixels": pixels}, {})
    found.put("seen.parquet", to_parquet(pa.table({"dataset": ["x"] * len(pixels), "pixel_sha256": pixels})))
    found.commit({})
    return found.storage.url(found.path)


def test_what_is_trained_on_is_not_tested_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    e, storage, own = trained_on(tmp_path, monkeypatch)
    ingest_test_sets(e, storage, own, pytest.fail)
    told = " ".join(capsys.readouterr().out.split())
    assert "test set same: 20 of 24 images are train or val images of `data`, were seen by a given generator, " in told
    assert "left out of every metric" in told
    assert "mars" not in told

    sets = {t.name: t for t in open_test_sets(e, storage, own)}
    assert {name: (len(t.ids), t.seen) for name, t in sets.items()} == {
        "test": (4, 0), "same": (4, 20), "mars": (24, 0),
    }  # fmt: skip
    assert sets["same"].ids == sets["test"].ids, "its own test images may stay"
    trial = trained(e, storage)
    asked = {n: predictions_artifact(trial, t).identity["config"] for n, t in sets.items()}
    assert asked["mars"] == {"test_set": "mars", "policy": {}}
    # Under other splits others are left: their predictions are not these.
    moved = dataclasses.replace(sets["same"], ids=sets["mars"].ids[:4])
    assert predictions_artifact(trial, moved).fp != predictions_artifact(trial, sets["same"]).fp
    smallest = detectable(Pipeline(e), e)
    assert smallest is not None
    assert (smallest.n_pos, smallest.n_neg) == ([2, 2], [2, 2])


def test_what_a_given_generator_saw_is_not_tested_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [given_generator(tmp_path / "other", *pixels) for pixels in (("m1", "m2"), ("m2", "m3", "x5"))]
    arms = {"mix": {}, "other": {"generator.path": paths[1]}, "unknown": {"generator.path": str(tmp_path / "no")}}
    sections = {"generator": {"path": paths[0]}, "training_set": {"ratio": 1}}
    for sweep, seen in (({}, {"same": 20, "mars": 2}), ({"sweep": {"arms": arms}}, {"same": 21, "mars": 3})):
        e, storage, own = trained_on(tmp_path / "runs", monkeypatch, **sections, **sweep)
        assert {t.name: t.seen for t in open_test_sets(e, storage, own)[1:]} == seen
    inside = f"train-generator/{Path(given_generator(tmp_path / 'runs', 'm1')).name}"
    e, storage, own = trained_on(tmp_path / "runs", monkeypatch, generator={"path": inside})
    assert open_test_sets(e, storage, own)[2].seen == 1


def test_a_set_that_was_seen_as_a_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = given_generator(tmp_path / "other", *(f"m{i}" for i in range(24)))
    e, storage, own = trained_on(tmp_path / "runs", monkeypatch, generator={"path": path})
    with pytest.raises(DataError, match=r"^evaluation\.test_sets\.mars: got '24 of 24 images that are train or val "):
        ingest_test_sets(e, storage, own, pytest.fail)


def test_a_test_set_more_is_all_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e, storage, own = judged_on(tmp_path, monkeypatch, {"mars": KNOWN})
    trial, (test, mars) = trained(e, storage), open_test_sets(e, storage, own)
    first = predictions_artifact(trial, test)
    first.put("test.parquet", b"")
    first.commit({})
    before = evaluate_artifact(e, storage, [trial], [test]).fp
    assert [predictions_artifact(trial, t).complete for t in (test, mars)] == [True, False]
    assert evaluate_artifact(e, storage, [trial], [test, mars]).fp != before

    asked: list[Any] = []
    monkeypatch.setattr(stage, "build_view", lambda e, s, i, size, ids: SimpleNamespace(path=f"view/{i.name}"))
    ray = SimpleNamespace(
        cluster_resources=dict, wait=lambda waiting, timeout: (waiting, []), get=list,
        remote=lambda **_: lambda _: SimpleNamespace(remote=lambda *given: asked.append(given) or len(asked)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    # An arm that came to the same classifier is not predicted with again.
    stage.predict_missing(e, storage, [trial, Trial("again", 0, e, trial.classifier)], [test, mars])
    assert [(given[1], [(a.path, view) for a, view in given[2]]) for given in asked] == [
        (f"{trial.classifier.path}/model", [(predictions_artifact(trial, mars).path, "view/mars")])
    ]


def test_test_sets_need_the_classes_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e, storage, own = judged_on(tmp_path, monkeypatch, {"mars": KNOWN})
    storage.delete(own.file("_SUCCESS"))
    with pytest.raises(NotReady, match="Run `raysynth ingest`"):
        ingest_test_sets(e, storage, own, pytest.fail)
