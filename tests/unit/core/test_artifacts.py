"""Artifacts: named by what makes them, complete only at the end, and able to say how they came to be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.errors import NotReady
from raysynth.core.experiment import Compute, Plan
from raysynth.core.identity import sha256_bytes
from raysynth.core.storage import Storage, open_storage


@pytest.fixture
def storage(any_root: str) -> Storage:
    return open_storage(any_root)


def test_an_interrupted_artifact_is_not_complete(storage: Storage) -> None:
    artifact = Artifact.at(storage, "plan", "chest", 1, Plan(), {"images": "abc"})
    artifact.put("rows.parquet", b"rows")
    assert storage.exists(artifact.file("rows.parquet"))
    assert not artifact.complete
    with pytest.raises(NotReady, match=r"plan/chest-\w{12} is not complete. Run `raysynth plan`"):
        artifact.digest()
    artifact.commit({})
    assert artifact.complete


def test_a_fresh_handle_finds_the_artifact(storage: Storage) -> None:
    first = Artifact.at(storage, "plan", "chest", 1, Plan(), {"images": "abc"})
    first.put("rows.parquet", b"rows")
    first.register("part-0.parquet", sha256_bytes(b"a worker's"))
    first.commit({"rows": 3})
    again = Artifact.at(storage, "plan", "chest", 1, Plan(), {"images": "abc"})
    assert (again.complete, again.path, again.digest()) == (True, first.path, first.digest())
    assert again.run_info()["outputs"] == {
        "part-0.parquet": sha256_bytes(b"a worker's"), "rows.parquet": sha256_bytes(b"rows"),
    }  # fmt: skip


def test_run_json_says_how_it_came_to_be(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    artifact = Artifact.at(storage, "plan", "chest", 7, Plan(seed=3), {"images": "abc"})
    artifact.put("x", b"1")
    artifact.commit({"rows": 3}, gpu_seconds=1.5, licence="CC BY 4.0")
    run = json.loads((tmp_path / artifact.path / "run.json").read_text())
    assert (run["stage"], run["name"], run["fp"]) == ("plan", "chest", artifact.fp)
    assert (run["version"], run["config"]["seed"], run["inputs"]) == (7, 3, {"images": "abc"})
    assert (run["counts"], run["gpu_seconds"], run["licence"]) == ({"rows": 3}, 1.5, "CC BY 4.0")
    assert run["digest"] == artifact.digest()
    assert run["seconds"] >= 0
    assert {"commit", "dirty"} == set(run["git"])
    assert {"python", "torch", "ray", "pyarrow"} <= set(run["versions"])
    assert run["command"]
    assert "seed: 3" in (tmp_path / artifact.path / "config.yaml").read_text()


def test_version_config_and_inputs_are_the_identity(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    base = Artifact.at(storage, "plan", "chest", 1, Plan(), {"images": "abc"}).fp
    assert Artifact.at(storage, "plan", "chest", 2, Plan(), {"images": "abc"}).fp != base
    assert Artifact.at(storage, "plan", "chest", 1, Plan(seed=1), {"images": "abc"}).fp != base
    assert Artifact.at(storage, "plan", "chest", 1, Plan(), {"images": "abd"}).fp != base
    assert Artifact.at(storage, "plan", "skin", 1, Plan(), {"images": "abc"}).fp == base


def test_the_content_digest_is_of_contents_not_of_names_or_times(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    digests = []
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        artifact = Artifact.at(storage, "plan", name, 1, {}, {})
        artifact.put("rows", data)
        artifact.commit({})
        digests.append(artifact.digest())
    assert digests[0] == digests[1] != digests[2]


def test_compute_is_in_no_stages_identity(tmp_path: Path) -> None:
    """Every compute key is changed at once; the plan's folder stays. Other stages' tests do the same for
    theirs."""
    from raysynth.stages.plan import plan_artifact

    storage = open_storage(str(tmp_path))
    images = Artifact.at(storage, "ingest", "t", 1, {}, {})
    images.commit({})
    e = build_experiment({"name": "t", "data": {"kind": "digits"}})
    changed = {}
    for f in dataclasses.fields(Compute):
        value = getattr(e.compute, f.name)
        text = value is None or isinstance(value, str)
        changed[f.name] = {"a": "b"} if isinstance(value, dict) else "x" if text else value + 1
    other = dataclasses.replace(e, compute=Compute(**changed))
    assert plan_artifact(other, storage, images).path == plan_artifact(e, storage, images).path


def test_another_experiments_artifact_of_the_same_identity_is_the_same(storage: Storage) -> None:
    made = Artifact.at(storage, "plan", "lungs", 1, Plan(), {"images": "abc"})
    made.put("rows.parquet", b"rows")
    assert Artifact.at(storage, "plan", "chest", 1, Plan(), {"images": "abc"}).path.startswith("plan/chest-")
    made.commit({})
    assert Artifact.at(storage, "plan", "chest", 1, Plan(), {"images": "abc"}).path == made.path
    assert Artifact.at(storage, "plan", "chest", 1, Plan(), {"images": "other"}).path.startswith("plan/chest-")


def test_an_artifact_is_opened_by_its_folder(storage: Storage) -> None:
    made = Artifact.at(storage, "plan", "long-name", 1, Plan(), {"images": "abc"})
    with pytest.raises(NotReady, match="not complete"):
        Artifact.open(storage, made.path)
    made.commit({})
    found = Artifact.open(storage, made.path)
    assert (found.path, found.fp, found.digest()) == (made.path, made.fp, made.digest())
