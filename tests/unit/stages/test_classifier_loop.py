"""The loop of a classifier on a few real digits: what it feeds, when it stops, which checkpoint it keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import ConfigError
from raysynth.core.evidence import Pretrain
from raysynth.core.experiment import Compute
from raysynth.core.schemas import from_parquet, members_schema, to_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.data.predictions import arrays
from raysynth.metrics.validation import validation_scores
from raysynth.models.classifier_export import load_classifier
from raysynth.stages import classifier_loop
from raysynth.stages.classifier_loop import HISTORY, STATE, Loop
from raysynth.stages.classifier_task import ClassifierTask
from raysynth.stages.classifier_trial import run_trial
from tests.classifiers import BATCH, tiny
from tests.digits import CLASSES, digit_images
from tests.unit.data.test_feed import SYNTHETIC, write_view

N_REAL = 60
VALIDATION = np.arange(400, 440)
MIX = [(0, "real", f"r{d}") for d in range(N_REAL)] + [(0, "synthetic", f"s{d}") for d in SYNTHETIC]
"""Phase, source and id of every member: far more synthetic images than real ones."""
TWO_STAGES = [(0, "synthetic", i) for _, source, i in MIX if source == "synthetic"] + [
    (1, "real", f"r{d}") for d in range(N_REAL)
]
FINDINGS = {"low": [1, -1, None, *[0] * 7], "high": [*[0] * 6, -1, 1, 1, 1]}
"""Raw annotation of every digit."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A root with the views of real, synthetic and validation images."""
    root = tmp_path_factory.mktemp("loop")
    for name, digits, prefix in (
        ("real", np.arange(N_REAL), "r"), ("synthetic", SYNTHETIC, "s"), ("validation", VALIDATION, "v"),
    ):  # fmt: skip
        index = write_view(root / "view" / name, digits, prefix).index
        for column in ("patient_id", "site"):
            index = index.append_column(column, pa.nulls(len(digits), pa.string()))
        shown = [int(label) for label in digit_images()[1][[int(i[1:]) for i in index["image_id"].to_pylist()]]]
        for finding, raw in FINDINGS.items():
            index = index.append_column(f"label_{finding}", pa.array([raw[d] for d in shown], pa.int8()))
        (root / "view" / name / "index.parquet").write_bytes(to_parquet(index))
    return open_storage(str(root))


def task(
    storage: Storage, members: Sequence[tuple[int, str, str]], phase_steps: Sequence[int] = (8,),
    real_fraction: float | None = None, **changes: Any,
) -> ClassifierTask:  # fmt: skip
    """A trial on `members`, a validation every second step; `changes` are of the classifier."""
    classifier = tiny(**{"steps": sum(phase_steps), "validate_every": 2, **changes})
    config = {"members": [list(m) for m in members], "real_fraction": real_fraction, "classifier": classifier}
    artifact = Artifact.at(storage, "train-classifier", "x", 1, config, {})
    rows = [list(column) for column in zip(*[(*m, m[2]) for m in members])]
    storage.put(artifact.file("members.parquet"), to_parquet(pa.table(rows, schema=members_schema())))
    views = {name: f"view/{name}" for name in ("real", "synthetic", "validation")}
    return ClassifierTask(
        artifact, classifier, Pretrain(), real_fraction, list(phase_steps), views, CLASSES, "single", {}, "general", 1,
        [f"v{d}" for d in VALIDATION], {}, {}, Compute(cache=f"{storage.root}/cache"), False, {},
    )  # fmt: skip


def trained(t: ClassifierTask) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The trial's result, and its history."""
    result = run_trial(t, lambda row: None)
    return result, [json.loads(row) for row in t.storage.get(t.artifact.file(HISTORY)).decode().splitlines()]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """AUROC of each validation to come."""
    coming: list[float] = []

    def next_score(*_: Any) -> dict[str, float]:
        return dict.fromkeys(("auroc", "accuracy", "balanced_accuracy"), value := coming.pop(0)) | {"val_loss": -value}

    monkeypatch.setattr(classifier_loop, "validation_scores", next_score)
    return coming


@pytest.mark.parametrize("monitor", ["auroc", "loss"])
def test_training_stops_after_so_many_validations_without_improvement(
    storage: Storage, scores: list[float], monitor: str
) -> None:
    scores += [0.5, 0.7, 0.7, 0.6, 0.9]
    t = task(storage, MIX, (10,), early_stopping=2, monitor=monitor)
    result, history = trained(t)
    assert [row["step"] for row in history] == [2, 4, 6, 8]
    assert result["best_step"] == 4
    assert t.artifact.run_info()["counts"]["steps"] == 8


def test_without_early_stopping_the_whole_budget_is_spent(storage: Storage, scores: list[float]) -> None:
    scores += [0.5, 0.7, 0.7, 0.6, 0.9]
    result, history = trained(task(storage, MIX, (10,)))
    assert [row["step"] for row in history] == [2, 4, 6, 8, 10]
    assert result == {"best_step": 10, "value": 0.9}


def test_only_checkpoints_of_the_last_stage_compete(storage: Storage, scores: list[float]) -> None:
    scores += [0.9, 0.8, 0.5, 0.6, 0.4]
    t = task(storage, TWO_STAGES, (4, 6))
    result, history = trained(t)
    assert [(row["phase"], row["best"]) for row in history] == [
        (0, False), (0, False), (1, True), (1, True), (1, False),
    ]  # fmt: skip
    assert result == {"best_step": 8, "value": 0.6}
    assert load_classifier(f"{storage.root}/{t.artifact.file('model')}").facts["step"] == 8


def test_patience_is_of_the_last_stage(storage: Storage, scores: list[float]) -> None:
    scores += [0.9, 0.8, 0.7, 0.6, 0.6, 0.9]
    _, history = trained(task(storage, TWO_STAGES, (6, 6), early_stopping=1))
    assert [row["step"] for row in history] == [2, 4, 6, 8, 10]


def test_real_images_have_their_share_of_every_batch(storage: Storage) -> None:
    loop = Loop(task(storage, MIX, real_fraction=0.25), lambda row: None, "cpu")
    assert {int((~loop.feeds[0].batch(step).synthetic).sum()) for step in range(30)} == {BATCH // 4}
    plain = Loop(task(storage, MIX), lambda row: None, "cpu")
    assert len({int((~plain.feeds[0].batch(step).synthetic).sum()) for step in range(30)}) > 1


@pytest.mark.parametrize(("validate_every", "what"), [(4, "the loss was"), (1, "predictions were")])
def test_a_training_that_diverges_names_its_rate(storage: Storage, validate_every: int, what: str) -> None:
    """Also where its last step breaks the weights, and no loss was computed with them."""
    t = task(storage, MIX, lr=1e30, grad_clip=1e30, warmup_steps=0, validate_every=validate_every)
    with pytest.raises(ConfigError, match=rf"classifier\.lr: got 1e\+30, must be lower: {what} not finite by step \d"):
        run_trial(t, lambda row: None)


def test_rare_classes_weigh_more(storage: Storage) -> None:
    loop = Loop(task(storage, MIX, class_weights="balanced"), lambda row: None, "cpu")
    counts = np.bincount(digit_images()[1][[*range(N_REAL), *SYNTHETIC]], minlength=10)
    weights = loop.training.class_weights
    assert weights is not None
    np.testing.assert_allclose(weights.numpy(), counts.sum() / (10 * counts), rtol=1e-6)
    assert weights.numpy().std() > 0.01
    assert Loop(task(storage, MIX), lambda row: None, "cpu").training.class_weights is None


def test_findings_with_a_policy_balanced_batches_and_weights(storage: Storage) -> None:
    # Under the policy four groups: low 0 to 2, high 7 to 9, neither 3 to 5, not known 6.
    findings = {"classes": list(FINDINGS), "kind": "multi", "policy": {"low": "ones", "high": "ignore"}}
    changes = {"sampler": "balanced", "class_weights": "balanced", "monitor": "loss"}
    t = dataclasses.replace(task(storage, MIX, **changes), **findings)
    loop = Loop(t, lambda row: None, "cpu")
    for step in range(5):
        low, high = loop.feeds[0].batch(step).labels.T
        quarter = BATCH // 4
        assert [(low == 1).sum(), (high == 1).sum(), np.isnan(high).sum()] == [quarter] * 3
        assert not np.isnan(low).any()
    shown = np.array(digit_images()[1])
    members = shown[[*range(N_REAL), *SYNTHETIC]]
    weights = loop.training.class_weights
    assert weights is not None
    np.testing.assert_allclose(
        weights.numpy(), [(members > 2).sum() / (members <= 2).sum(), (members < 6).sum() / (members > 6).sum()],
        rtol=1e-6,
    )  # fmt: skip
    result, history = trained(t)
    table = from_parquet(storage.get(t.artifact.file("validation.parquet")))
    assert table["true_low"].to_pylist() == [int(d <= 2) for d in shown[VALIDATION]]
    assert table["true_high"].to_pylist() == [None if d == 6 else int(d > 6) for d in shown[VALIDATION]]
    scores = validation_scores(table, list(FINDINGS), "multi")
    best = next(row for row in history if row["step"] == result["best_step"])
    assert {name: best[name] for name in scores} == pytest.approx(scores)
    exported = load_classifier(f"{storage.root}/{t.artifact.file('model')}")
    assert (exported.facts["classes"], exported.facts["kind"]) == (list(FINDINGS), "multi")
    np.testing.assert_allclose(exported.predict(digit_images()[0][VALIDATION]), arrays(table, list(FINDINGS))[1], 1e-5)


def test_a_trial_that_was_cut_off_goes_on_to_the_same_history(storage: Storage) -> None:
    def kept(history: list[dict[str, Any]]) -> list[tuple]:
        return [(row["step"], row["loss"], row["val_loss"], row["best"]) for row in history]

    whole = task(storage, MIX, lr=0.02)
    _, expected = trained(whole)
    cut = task(storage, MIX, lr=0.02, early_stopping=99)  # another folder
    steps: list[int] = []

    def dies(row: dict[str, Any]) -> None:
        steps.append(row["step"])
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(cut, dies)
    assert storage.exists(cut.artifact.file(STATE))
    result, history = trained(cut)
    assert steps == [2, 4]
    assert kept(history) == kept(expected)
    assert result["best_step"] == [row for row in expected if row["best"]][-1]["step"]
    assert not storage.exists(cut.artifact.file(STATE))
