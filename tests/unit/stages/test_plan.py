"""The plan's artifact: what is in its identity, what is only a selection. No ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import DataError
from raysynth.core.evidence import Classifier
from raysynth.core.experiment import Data, Experiment, Labels, Plan, TrainingSet
from raysynth.core.schemas import to_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.stages.plan import load_plan, plan, plan_artifact, wanted_rows
from raysynth.synth.wanted import unpack
from tests.unit.data.test_subsets import image_table


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


@pytest.fixture
def images(storage: Storage) -> Artifact:
    artifact = Artifact.at(storage, "ingest", "t", 1, {}, {})
    artifact.put("table.parquet", to_parquet(image_table()))
    artifact.commit({})
    return artifact


def experiment(**wanted: Any) -> Experiment:
    return Experiment(name="t", training_set=TrainingSet(n_per_class=5), plan=Plan(replicas=4, **wanted))


@pytest.mark.parametrize("nothing", [{"n_synth": 0}, {"ratio": 0}])
def test_no_row_may_be_wanted(
    storage: Storage, images: Artifact, capsys: pytest.CaptureFixture[str], nothing: dict[str, int]
) -> None:
    plan(experiment(**nothing), storage, images)
    assert "plan: 0 of 60 rows wanted, from 15 real images" in capsys.readouterr().out


def test_plan_is_stored_and_read(
    storage: Storage, images: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = plan(experiment(ratio=2), storage, images)
    assert "plan: 30 of 60 rows wanted, from 15 real images" in capsys.readouterr().out
    assert [e.path.rsplit("/", 1)[1] for e in storage.list(artifact.path)] == [
        "_SUCCESS", "config.yaml", "joint.csv", "rows.parquet", "run.json",
    ]  # fmt: skip
    rows = load_plan(storage, artifact)
    assert rows["rank"].to_pylist() == list(range(60))
    wanted = wanted_rows(experiment(ratio=2), storage, artifact)
    assert pa.concat_tables(wanted.tables(np.ones(30, bool))).equals(rows.slice(0, 30))
    assert unpack(wanted.keys).to_pylist() == rows["row_key"].to_pylist()[:30]
    of_quota = wanted_rows(experiment(quota={"c0": 0}), storage, artifact)
    kept = rows.filter(pc.equal(rows["label_c0"], 0))
    assert of_quota.ranks.tolist() == kept["rank"].to_pylist()
    assert pa.concat_tables(of_quota.tables(np.ones(40, bool))).equals(kept.combine_chunks())
    joint = storage.get(artifact.file("joint.csv")).decode().splitlines()
    assert joint[1] == '"c0",5,0.333333,20,0.333333,5,4'
    assert artifact.run_info()["counts"] == {"rows": 60, "n_real": 15, "cells": 3}


def test_the_wanted_rows_are_shown_at_each_run_and_their_shares_add_up(
    storage: Storage, images: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    e = experiment(over=["label", "sex"], quota={"c0": 0})
    plan(e, storage, images)
    first = capsys.readouterr().out
    plan(e, storage, images)
    assert capsys.readouterr().out == first
    cells = [line.split() for line in first.splitlines() if line.startswith(("c", "unknown"))]
    assert cells[-1][:2] == ["unknown", "unknown"]
    assert sum(float(c[3]) for c in cells) == pytest.approx(100, abs=0.5)
    assert sum(float(c[5]) for c in cells) == pytest.approx(100, abs=0.5)
    assert {c[4] for c in cells if c[0] == "c0"} == {"0"}


def test_a_policy_is_another_plan_only_where_findings_follow_it(storage: Storage, images: Artifact) -> None:
    def path(kind: str, **policy: str) -> str:
        labels = Labels(kind=kind, policy=policy)  # type: ignore[arg-type]
        e = dataclasses.replace(experiment(), data=Data(labels=labels))
        return plan_artifact(e, storage, images).path

    assert path("single", c0="ones") == path("single")
    assert path("multi", c0="ignore") == path("multi")
    assert len({path("multi"), path("multi", c0="ones"), path("multi", c0="zeros")}) == 3


def test_a_selection_is_the_same_plan(storage: Storage, images: Artifact) -> None:
    path = plan_artifact(experiment(), storage, images).path
    for same in (experiment(ratio=2), experiment(n_synth=3), experiment(quota={"c0": 1})):
        assert plan_artifact(same, storage, images).path == path
    for other in (
        experiment(seed=1), dataclasses.replace(experiment(), training_set=TrainingSet(n_per_class=6)),
        dataclasses.replace(experiment(), plan=Plan(replicas=5)),
    ):  # fmt: skip
        assert plan_artifact(other, storage, images).path != path
    first = plan(experiment(), storage, images)
    before = storage.list(first.path)
    plan(experiment(ratio=3), storage, images)
    assert storage.list(first.path) == before


def test_more_than_the_plan_has_is_refused(storage: Storage, images: Artifact) -> None:
    trained = dataclasses.replace(experiment(), classifier=Classifier(), training_set=TrainingSet(5, n_synth=61))
    with pytest.raises(DataError, match=r"training_set.n_synth: got 61, must be at most 60"):
        plan(trained, storage, images)
    with pytest.raises(DataError, match=r"plan.ratio: got 5.0, must be at most 4 .*Raise plan.replicas"):
        plan(experiment(ratio=5.0), storage, images)
