"""What ingest's table tells against a run is told before its first generator is trained. No Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import DataError
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import open_storage
from raysynth.stages import after_ingest, sweep
from raysynth.stages.after_ingest import check_judging
from raysynth.stages.pipeline import Pipeline, stages_of
from tests.digits import digit_artifact
from tests.unit.stages.test_sweep import ARMS, experiment, ingested

REAL = {"training_set.strategy": "real"}


def told(e: Experiment, words: str, stages: list[str] | None = None) -> None:
    """Runs what follows ingest, and expects these words and nothing made."""
    pipeline = ingested(e)
    with pytest.raises(DataError, match=words):
        pipeline.run([s for s in stages or stages_of(e) if s != "ingest"])
    assert pipeline.storage.folders() == ["ingest"]


@pytest.mark.parametrize(("arm", "words"), [
    ({"training_set.n_synth": 5000}, r"training_set\.n_synth: got 5000, must be at most 80, .*Raise plan\.replicas"),
    ({"training_set.quota": {"c9": 5}}, r"training_set\.quota\.c9: got 5, must be >= 0 and about one of 0, 1, 2"),
    ({"training_set.n_per_class": 30}, r"training_set\.n_per_class: got 30, must be at most \d, the train images of"),
    ({**REAL, "training_set.n_per_class": 30}, r"training_set\.n_per_class: got 30, must be at most \d"),
    ({"training_set.strategy": "synthetic", "training_set.quota": {"3": 0}},
     r"training_set: got 'no positive image of 3"),
    ({"plan.kind": "balanced", "plan.n": 40, "plan.targets": {"label=ten": 5}},
     r"plan\.targets\.label=ten: got 'label=ten"),
    ({"plan.over": ["sxe"]}, r"plan\.over\[0\]: got 'sxe', .*Did you mean sex"),
])  # fmt: skip
def test_an_arm_is_named_before_the_first_generator(tmp_path: Path, arm: dict[str, Any], words: str) -> None:
    told(experiment(tmp_path, {"real": REAL, "x1": ARMS["x1"], "odd": arm}), rf"sweep\.arms\[odd\]\.{words}")


def test_what_no_arm_typed_is_not_put_under_one(tmp_path: Path) -> None:
    arm = {"generator.train_on": "donor", "training_set.n_per_class": 2}
    e = experiment(tmp_path, {"real": REAL, "x1": ARMS["x1"], "odd": arm})
    told(e, r"^label: got '9', must be a class the generator has seen.* Found in the arm odd\.$")
    e = experiment(tmp_path, {"real": REAL, "x1": ARMS["x1"]}, training_set={"n_per_class": 30})
    told(e, r"^training_set\.n_per_class: got 30, .* Found in the arm real\.$")


def test_a_factor_is_named(tmp_path: Path) -> None:
    e = experiment(tmp_path, {"mix": {}}, sweep={"factors": {"training_set.n_synth": [5, 5000]}})
    told(e, r"sweep\.factors\.training_set\.n_synth: got 5000")


@pytest.mark.parametrize(("sections", "words"), [
    ({"training_set": {"n_synth": 5000}}, r"training_set\.n_synth: got 5000, must be at most \d+, the plan's rows"),
    ({"training_set": {"quota": {"c9": 5}}}, r"training_set\.quota\.c9: got 5"),
    ({"plan": {"n_synth": 5000}, "classifier": None}, r"plan\.n_synth: got 5000"),
    ({"evaluation": {"subgroups": ["*", "sxe"]}},
     r"evaluation\.subgroups\[1\]: got 'sxe', must be one of \*, sex, site\. Did you mean sex"),
    ({"evaluation": {"findings": ["1", "ten"]}}, r"evaluation\.findings\[1\]: got 'ten', must be one of 0, 1, 2"),
])  # fmt: skip
def test_one_experiment(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    told(experiment(tmp_path, {}, sweep={}, **{"training_set": {}, **sections}), rf"^{words}")


@pytest.mark.parametrize("judging", [{"subgroups": ["sxe"]}, {"findings": ["ten"]}])
def test_what_a_sweep_is_judged_by(tmp_path: Path, judging: dict[str, Any]) -> None:
    e = experiment(tmp_path, {"real": REAL, "x1": ARMS["x1"]}, evaluation=judging)
    told(e, rf"^evaluation\.{next(iter(judging))}\[0\]: got ")


def test_an_external_test_set_without_the_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = {"subgroups": ["sex"], "test_sets": {"mars": {"kind": "digits"}}}
    e = experiment(tmp_path, {"real": REAL}, evaluation=evaluation)
    mars = Artifact.at(open_storage(e.root), "ingest", "mars", 1, {}, {})
    own = ingested(e).images
    table = from_parquet(own.storage.get(own.file("table.parquet")))
    mars.put("table.parquet", to_parquet(table.drop_columns(["attr_sex"])))
    mars.commit({})
    monkeypatch.setattr(after_ingest, "external_sets", lambda e, storage: {"mars": (e, mars)})
    check_judging(e, own.storage, own)
    own.put("table.parquet", to_parquet(table.drop_columns(["attr_sex"])))
    with pytest.raises(DataError, match=r"evaluation\.subgroups\[0\]: got 'sex', must be one of \*, site\."):
        check_judging(e, own.storage, own)
    mars.put("table.parquet", to_parquet(table))
    check_judging(e, own.storage, own)


def test_validation_that_judges_nothing_is_told_to_who_trains_a_classifier(tmp_path: Path) -> None:
    e = experiment(tmp_path, {"x1": ARMS["x1"]})
    pipeline = Pipeline(e)
    pipeline.images = digit_artifact(open_storage(e.root), n=160)
    with pytest.raises(DataError, match=r"^data\.split\.val: got '0 validation images"):
        pipeline.run(["sweep"])
    after_ingest.look_ahead(pipeline, ["plan", "generate"])


def test_seeds_and_sizes_of_one_arm_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    check = after_ingest._check
    monkeypatch.setattr(after_ingest, "_check", lambda p, stages: (looked.append(p.experiment.name), check(p, stages)))
    arms = {"real": REAL, "x1": ARMS["x1"], "x1 small": {**ARMS["x1"], "classifier.architecture": "resnet10t"}}
    sweep.check_arms(ingested(experiment(tmp_path, arms)).arm_pipelines)
    assert len(looked) == 2
