"""What a sweep makes once for all of its arms, how it names its trials, and what a dry run knows. No Ray."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.errors import ConfigError, DataError, EnvironmentFault
from raysynth.core.experiment import Compute, Experiment
from raysynth.core.storage import open_storage
from raysynth.stages import after_ingest
from raysynth.stages import pipeline as pipeline_of
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.plan import plan
from raysynth.stages.status import Status
from raysynth.stages.sweep import _cover, find_trials, make_images, named_trials
from raysynth.stages.sweep_plan import plan_of_sweep
from raysynth.stages.trial import side_by_side, trial_resources
from tests.digits import digit_artifact

ARMS: dict[str, Any] = {
    "real": {"training_set.strategy": "real"},
    "x1": {"training_set.strategy": "mix", "training_set.ratio": 1},
    "x3": {"training_set.strategy": "mix", "training_set.ratio": 3},
    "first 5": {"training_set.strategy": "pretrain", "training_set.n_synth": 5},
}


def experiment(root: Path, arms: dict[str, Any] = ARMS, **sections: Any) -> Experiment:
    return build_experiment({
        "name": "digits", "root": str(root), "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "training_set": {"n_per_class": 2}, "plan": {"replicas": 4}, "classifier": {"steps": 100, "batch_size": 8},
        "sweep": {"arms": arms, "seeds": [0, 1]}, **sections,
    })  # fmt: skip


def ingested(e: Experiment) -> Pipeline:
    """A pipeline whose ingest is done: 160 digits, every fourth for test, every fourth for validation."""
    pipeline = Pipeline(e)
    pipeline.images = digit_artifact(open_storage(e.root), n=160, val=True)
    return pipeline


def planned(pipeline: Pipeline) -> None:
    """Stands for a trained generator, and makes the plans of all arms."""
    for _, p in pipeline.arm_pipelines:
        if not p.generator.complete:
            p.generator.put("export/condition.json", p.generator.fp.encode())
            p.generator.commit({})
        if not p.plan.complete:
            plan(p.experiment, p.storage, p.images)


def lists(pipeline: Pipeline) -> dict[str, Artifact]:
    """Arm -> what lists its synthetic images."""
    own = pipeline.arm_pipelines
    needing = {i: p for i, (_, p) in enumerate(own) if p.experiment.training_set.needs_synthetic}
    return {f"{own[i][0].name}, {own[i][0].seed}": a for i, a in _cover(needing).items()}


def test_the_largest_selection_is_made_for_all(tmp_path: Path) -> None:
    pipeline = ingested(experiment(tmp_path))
    planned(pipeline)
    found = lists(pipeline)
    assert set(found) == {f"{a}, {s}" for a in ("x1", "x3", "first 5") for s in (0, 1)}
    assert len({a.path for a in found.values()}) == 1
    assert next(iter(found.values())).identity["config"]["ratio"] == 3


def test_a_weights_file_counts_by_its_content_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(init: str) -> str:
        classifier = {"steps": 100, "batch_size": 8, "init": init}
        e = experiment(tmp_path / "runs", {"real": ARMS["real"]}, classifier=classifier)
        return find_trials(ingested(e), e)[0].classifier.path

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("a.pth").write_bytes(b"weights")
    first = named(str(tmp_path / "a.pth"))
    Path("moved").mkdir()
    Path("a.pth").rename("moved/b.pth")
    assert named("moved/b.pth") == named("~/moved/b.pth") == first
    Path("moved/b.pth").write_bytes(b"others!")
    assert named("moved/b.pth") != first
    with pytest.raises(ConfigError, match=r"classifier\.init: got 'a\.pth', .*a weights file that exists"):
        named("a.pth")


def test_status_shows_what_is_rendered_and_no_selection_of_it(tmp_path: Path) -> None:
    pipeline = ingested(experiment(tmp_path))
    planned(pipeline)
    console = Console(file=io.StringIO(), width=160)
    console.print(Status(pipeline).look())
    assert re.findall(r"[\d,]+/[\d,]+ images", console.file.getvalue()) == ["0/60 images"]


def test_arms_with_another_guidance_or_generator_seed_have_images_of_their_own(tmp_path: Path) -> None:
    arms = {"x1": ARMS["x1"], "x3": ARMS["x3"], "x2 w": {"training_set.ratio": 2, "sampling.guidance_scale": 2},
            "x2 g": {"training_set.ratio": 2, "generator.seed": 1}}  # fmt: skip
    pipeline = ingested(experiment(tmp_path, arms))
    planned(pipeline)
    assert [(k, a.identity["config"]["ratio"], a.identity["config"]["set"]["guidance_scale"]) for k, a in
            lists(pipeline).items() if k.endswith("0")] == [
        ("x3, 0", 3, 1), ("x1, 0", 3, 1), ("x2 w, 0", 2, 2), ("x2 g, 0", 2, 1),
    ]  # fmt: skip


def test_an_arm_that_trains_on_all_it_renders_gets_exactly_that(tmp_path: Path) -> None:
    arms = {"x3": ARMS["x3"], "x2 rendered": {"training_set.strategy": "mix", "plan.ratio": 2},
            "all": {"training_set.strategy": "mix"}}  # fmt: skip
    pipeline = ingested(experiment(tmp_path, arms))
    planned(pipeline)
    found = {k: a.identity["config"]["ratio"] for k, a in lists(pipeline).items() if k.endswith("0")}
    assert found == {"all, 0": None, "x3, 0": None, "x2 rendered, 0": 2}


def test_trials_have_names_once_their_images_are_there(tmp_path: Path) -> None:
    pipeline = ingested(experiment(tmp_path, validation_free()))
    own = pipeline.arm_pipelines
    assert [t is None for t in named_trials(own)] == [False, False, True, True]
    with pytest.raises(EnvironmentFault, match=r"2 of 4 arms wait for their images\. Run `raysynth sweep` first"):
        find_trials(pipeline, pipeline.experiment)


@pytest.mark.parametrize(("arm", "words"), [
    ({"training_set.quota": {"c9": 5}}, r"quota\.c9: got 5"), ({"training_set.n_synth": 5000}, "n_synth: got 5000"),
])  # fmt: skip
@pytest.mark.parametrize("there", [True, False])
def test_an_arm_that_selects_what_its_plan_has_not_is_named(
    tmp_path: Path, arm: dict[str, Any], words: str, there: bool
) -> None:
    """Also where the others' plan is there already, and it is the first to be named by."""
    arms = {k: ARMS[k] for k in ("real", "x1")}
    if there:
        planned(ingested(experiment(tmp_path, arms)))
    pipeline = ingested(experiment(tmp_path, {**arms, "odd": arm}))
    with pytest.raises(DataError, match=rf"^sweep\.arms\[odd\]\.training_set\.{words}"):
        pipeline.run(["sweep"])
    with pytest.raises(DataError, match=rf"^sweep\.arms\[odd\]\.training_set\.{words}"):
        plan_of_sweep(pipeline, pipeline.experiment)


def test_a_plan_that_is_there_is_not_made_again_to_look_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = ingested(experiment(tmp_path))
    planned(pipeline)
    monkeypatch.setattr(after_ingest, "plan_rows", pytest.fail)
    after_ingest.check_arms(pipeline.arm_pipelines)


def test_an_arm_with_images_of_its_own_ingests_no_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(pipeline_of, "ingest_test_sets", lambda e, *_: asked.append(e.data.age_bins))
    monkeypatch.setattr(pipeline_of, "ingest", lambda e, storage: digit_artifact(storage, n=160, val=True))
    monkeypatch.setattr(Pipeline, "resources", None)
    e = experiment(tmp_path, {"real": ARMS["real"], "old": {**ARMS["real"], "data.age_bins": [70]}})
    pipeline = Pipeline(e)
    pipeline.do("ingest")
    make_images(pipeline.arm_pipelines)
    assert asked == [[18, 40, 60, 80]]


def test_every_seed_of_an_arm_is_a_classifier_of_its_own(tmp_path: Path) -> None:
    arms = {s: {"training_set.strategy": s} for s in ("real", "duplicate", "real_real")}
    pipeline = ingested(experiment(tmp_path, arms))
    assert len({a.path for a in find_or_none(pipeline)}) == 6


def validation_free() -> dict[str, Any]:
    return {k: ARMS[k] for k in ("real", "x1")}


def test_dry_run_before_and_after_ingest(tmp_path: Path) -> None:
    e = experiment(tmp_path, evaluation={"min_positives": 2})
    before = plan_of_sweep(Pipeline(e), e)
    assert (before.trials, before.done, before.sets, before.detectable) == (8, None, None, None)
    assert before.lines()[0] == "sweep: 8 trials, not known before their images are made"
    pipeline = ingested(e)
    known = plan_of_sweep(pipeline, e)
    assert known.done == 0
    assert known.sets is not None
    assert [(s.wanted, s.left, s.hours) for s in known.sets] == [(60, 60, None)]  # 3 x 20, once
    assert known.trial_hours is None
    assert known.detectable is not None
    assert sum(known.detectable.n_pos) == 40  # the test images, no other
    assert 0.01 < known.detectable.difference < 0.5
    recalls = experiment(tmp_path, evaluation={"min_positives": 2, "primary": {"metric": "balanced_accuracy"}})
    of_classes = plan_of_sweep(ingested(recalls), recalls).detectable
    assert of_classes is not None
    # Ten classes of n_k test images each, of recall 0.8: sqrt(sum 0.16 / n_k) / 10.
    assert of_classes.difference == pytest.approx(2.8015852 * sum(0.16 / n for n in of_classes.n_pos) ** 0.5 / 10)
    planned(pipeline)
    assert plan_of_sweep(pipeline, e) == known


def test_dry_run_prices_what_is_left_at_the_pace_of_finished_classifiers(tmp_path: Path) -> None:
    e = experiment(tmp_path, validation_free(), compute={"price_per_gpu_hour": 3.0})
    pipeline = ingested(e)
    done = find_or_none(pipeline)[0]
    done.put("members.parquet", b"")
    done.commit({"steps": 50}, gpu_seconds=180, train_seconds=360.0)
    found = plan_of_sweep(pipeline, e)
    assert found.done == 1
    # Three left, 100 steps each at 7.2 s a step; half of it on a GPU.
    assert found.trial_hours == pytest.approx(3 * 100 * 7.2 / 3600)
    assert found.trial_cost == pytest.approx(3 * 100 * 3.6 / 3600 * 3.0)
    assert "sweep: 0.60 trial hours of training, cost 0.90" in found.lines()


def test_status_of_a_sweep_whose_trials_are_trained_one_by_one(tmp_path: Path) -> None:
    pipeline = ingested(experiment(tmp_path, {s: {"training_set.strategy": s} for s in ("real", "duplicate")}))

    def states() -> str:
        text = io.StringIO()
        Console(file=text, width=200).print(Status(pipeline).look())
        return " ".join(text.getvalue().split())

    assert "sweep missing" in states()
    assert "trials: 0/4 trained" in states()
    done = find_or_none(pipeline)[0]
    done.put("members.parquet", b"")
    done.commit({"steps": 50})
    assert "sweep begun" in states()
    assert "trials: 1/4 trained" in states()


def find_or_none(pipeline: Pipeline) -> list[Artifact]:
    return [t.classifier for t in named_trials(pipeline.arm_pipelines) if t is not None]


def test_how_many_trials_fit() -> None:
    box = [{"CPU": 2.0, "memory": 1e9}]
    assert side_by_side(Compute(), False, box) == 2
    assert side_by_side(Compute(trial_cpus=2), False, box) == 1
    assert side_by_side(Compute(trial_gpus=0.5), True, [{"CPU": 16.0, "GPU": 2.0}]) == 4
    # A trial that has two workers takes no CPU itself: on two of them it would wait for its own workers.
    pair = Compute(classifier_workers=2)
    assert side_by_side(pair, False, box) == 1
    assert "CPU" not in trial_resources(pair, False)
    with pytest.raises(EnvironmentFault, match=r"takes 1 process\(es\) of 4 CPU, for which.*1 node"):
        side_by_side(Compute(trial_cpus=4), False, box)


def test_arms_without_synthetic_images_make_no_generator(tmp_path: Path) -> None:
    controls = ("real", "duplicate", "upper_bound", "real_real")
    pipeline = ingested(experiment(tmp_path, {s: {"training_set.strategy": s} for s in controls}))
    own = pipeline.arm_pipelines
    make_images(own)
    assert pipeline.storage.folders() == ["ingest"]
    assert all(t is not None and t.generated is None for t in named_trials(own))
