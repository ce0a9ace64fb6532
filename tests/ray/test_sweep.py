"""A sweep on real Ray Tune: images rendered once, trials as artifacts, kills, failures, and no test image anywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import GateFailed
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import Storage
from raysynth.data.views import View
from raysynth.stages.classifier_trial import run_trial
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.sweep import find_trials, load_trials, sweep
from raysynth.stages.sweep_plan import plan_of_sweep
from raysynth.stages.sweep_table import SweepTable
from raysynth.stages.train_classifier import prepare
from tests.ray.sweep_driver import ARMS, small_sweep

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def swept(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A whole sweep, never interrupted."""
    place = tmp_path_factory.mktemp("sweep")
    experiment = small_sweep(str(place / "runs"), str(place / "cache"))
    return sweep(Pipeline(experiment), experiment)


def values(artifact: Artifact) -> dict[str, float]:
    """Arm -> its best validation metric."""
    return {r["arm"]: r["value"] for r in load_trials(artifact).to_pylist()}


def finished(storage: Storage) -> dict[str, str]:
    """Complete classifier -> its run.json."""
    folders = [f"train-classifier/{f}" for f in storage.folders("train-classifier")]
    return {f: storage.get(f"{f}/run.json").decode() for f in folders if storage.exists(f"{f}/_SUCCESS")}


def test_the_table_of_trials(swept: Artifact) -> None:
    rows = load_trials(swept).to_pylist()
    assert [r["arm"] for r in rows] == list(ARMS)
    assert {r["state"] for r in rows} == {"done"}
    assert [(r["strategy"], r["n_real"], r["n_synth"], r["ratio"]) for r in rows] == [
        ("real", 30, 0, 0), ("mix", 30, 30, 1), ("mix", 30, 60, 2), ("mix", 30, 30, 1),
    ]  # fmt: skip
    assert all(r["steps"] == 60 and 0 < r["best_step"] <= 60 and r["seconds"] > 0 for r in rows)
    assert {r["monitor"] for r in rows} == {"auroc"}
    assert all(0.3 < r["value"] <= 1 for r in rows)
    assert json.loads(rows[2]["settings"]) == {"training_set.ratio": 2}
    # Two arms that are the same classifier train it once.
    assert rows[1]["artifact"] == rows[3]["artifact"]
    assert len(finished(swept.storage)) == 3
    assert swept.run_info()["counts"] == {"trials": 4, "distinct": 3, "trained": 3}
    for r in rows:
        assert any(e.path.startswith(f"{r['artifact']}/log/events.") for e in swept.storage.list(r["artifact"]))


def test_images_are_rendered_once_at_the_largest_ratio(swept: Artifact) -> None:
    experiment = small_sweep(swept.storage.root, "")
    trials = find_trials(Pipeline(experiment), experiment)
    generated = {t.generated.path for t in trials if t.generated}
    assert len(generated) == 1
    sets = swept.storage.folders("synthetic-sets")
    assert len(sets) == 1
    markers = [e.path for e in swept.storage.list(f"synthetic-sets/{sets[0]}/done")]
    keys: Counter[str] = Counter()
    for path in markers:
        marker = json.loads(swept.storage.get(path))
        part = from_parquet(swept.storage.get(f"synthetic-sets/{sets[0]}/{marker['part']}"), ["row_key"])
        assert part.num_rows == marker["rows"]
        keys.update(part["row_key"].to_pylist())
    assert len(keys) == 60  # 2 x 30: the ratio of the largest arm
    assert set(keys.values()) == {1}


def test_a_second_sweep_trains_only_the_arm_it_adds(swept: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    before = finished(swept.storage)
    arms = {"plain": ARMS["real"], "x2": ARMS["x2"], "repeated": {"training_set.strategy": "duplicate"}}
    experiment = small_sweep(swept.storage.root, "", arms)
    pipeline = Pipeline(experiment)
    assert plan_of_sweep(pipeline, experiment).done == 2
    second = sweep(pipeline, experiment)
    assert second.run_info()["counts"] == {"trials": 3, "distinct": 3, "trained": 1}
    after = finished(swept.storage)
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()
    assert values(second)["plain"] == values(swept)["real"]
    assert plan_of_sweep(pipeline, experiment).trial_hours == 0
    monkeypatch.delattr("raysynth.stages.sweep.make_images")  # what is done is not looked at again
    assert sweep(pipeline, experiment).path == second.path


def test_a_trial_is_told_of_no_test_image(swept: Artifact) -> None:
    experiment = small_sweep(swept.storage.root, "")
    pipeline = Pipeline(experiment)
    table = from_parquet(swept.storage.get(pipeline.images.file("table.parquet"))).to_pylist()
    tested = {r["image_id"] for r in table if r["split"] == "test"}
    assert tested
    for trial in find_trials(pipeline, experiment):
        task = prepare(trial.experiment, swept.storage, trial.images, trial.generated)
        assert not tested & set(task.validation)
        assert "test" not in task.views
        for folder in task.views.values():
            index = View(f"{swept.storage.root}/{folder}").index
            assert "test" not in index["split"].to_pylist()
            assert not tested & set(index["image_id"].to_pylist())
        told = repr(dataclasses.asdict(dataclasses.replace(task, validation=[])))
        assert not [i for i in tested if i in told]


@pytest.fixture(scope="module")
def resumed(swept: Artifact, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, dict[str, str]]:
    """The same sweep without a single test picture, its driver killed in the middle and started again.

    Returns:
        its artifact, and the classifiers that were finished when the driver was killed.
    """
    place = tmp_path_factory.mktemp("killed")
    root, cache = place / "runs", str(place / "cache")
    for stage in ("ingest", "train-generator", "plan", "generate", "synthetic-sets"):
        shutil.copytree(f"{swept.storage.root}/{stage}", root / stage)
    lost = sum(without_test_pictures(part) for part in root.glob("ingest/*/images/*.parquet"))
    assert lost > 300
    experiment = small_sweep(str(root), cache)
    storage = Pipeline(experiment).storage

    command = [sys.executable, "-m", "tests.ray.sweep_driver", str(root), cache]
    with open(place / "first.txt", "w") as out:
        code = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=out, stderr=out, check=False).returncode
    assert code == -signal.SIGKILL, (place / "first.txt").read_text()
    before = finished(storage)
    assert any(e.path.endswith("checkpoints/training.pt") for e in storage.list("train-classifier"))
    return sweep(Pipeline(experiment), experiment), before


def without_test_pictures(part: Path) -> int:
    """Takes the bytes of every test image out of an ingest part. Returns how many."""
    table = from_parquet(part.read_bytes())
    rows = table.to_pylist()
    for row in rows:
        if row["split"] == "test":
            row["image"] = {"bytes": b"gone", "path": None}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), part)
    return sum(row["split"] == "test" for row in rows)


def test_a_killed_driver_goes_on_with_what_is_missing(
    swept: Artifact, resumed: tuple[Artifact, dict[str, str]]
) -> None:
    again, before = resumed
    assert 1 <= len(before) < 3
    assert before.items() <= finished(again.storage).items()  # the finished arms are as they were
    assert values(again) == values(swept)
    assert again.run_info()["counts"]["trained"] <= 3 - len(before)


def test_without_any_test_picture_the_same_is_trained(
    swept: Artifact, resumed: tuple[Artifact, dict[str, str]]
) -> None:
    def weights(artifact: Artifact) -> dict[str, str]:
        return {r["arm"]: Artifact.open(artifact.storage, r["artifact"]).run_info()["digest"]
                for r in load_trials(artifact).to_pylist()}  # fmt: skip

    assert weights(resumed[0]) == weights(swept)


def tune_workers() -> list[int]:
    """Process ids of trials of this process's own Ray: their parent raylet is our child."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid, (parent, command) in found.items() if command.startswith("ray::ImplicitFunc")
            and found.get(parent, (0, ""))[0] == os.getpid()]  # fmt: skip


def test_a_dead_worker_is_restarted_and_a_diverged_trial_ends_alone(
    swept: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"diverges": {"training_set.strategy": "real", "classifier.lr": 1e30, "classifier.grad_clip": 1e30},
            "killed": {"training_set.strategy": "real", "classifier.steps": 200}}  # fmt: skip
    experiment = small_sweep(swept.storage.root, "", arms)
    pipeline = Pipeline(experiment)
    storage = pipeline.storage
    victim = next(t for t in find_trials(pipeline, experiment) if t.arm == "killed")
    killed: list[int] = []
    tables: list[SweepTable] = []
    told = SweepTable.reported

    def reported(self: SweepTable, number: int, result: dict) -> None:
        told(self, number, result)
        tables.append(self)
        # Ray Tune holds the trial until its driver has answered.
        if self.rows[number].arm == "killed" and not killed:
            assert storage.exists(victim.classifier.file("checkpoints/training.pt"))
            for pid in tune_workers():
                with suppress(ProcessLookupError):  # the other trial's, which has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    monkeypatch.setattr(SweepTable, "reported", reported)
    with pytest.raises(GateFailed, match=r"1 of 2 classifiers failed: diverges, seed 0 \(classifier.lr: got 1e\+30"):
        sweep(pipeline, experiment)
    assert killed
    first, second = tables[0].rows
    assert second.began < first.ended, "one after the other"
    table = next(f for f in storage.folders("sweep") if not storage.exists(f"sweep/{f}/_SUCCESS"))
    rows = from_parquet(storage.get(f"sweep/{table}/trials.parquet")).to_pylist()
    states = {r["arm"]: (r["state"], r["reason"][:13]) for r in rows}
    assert states == {"diverges": ("failed", "classifier.lr"), "killed": ("done", "")}
    steps = [json.loads(row)["step"] for row in storage.get(victim.classifier.file("log/history.jsonl")).splitlines()]
    assert steps == sorted(set(steps))
    # One process without Ray, never interrupted, trains the same weights.
    task = prepare(victim.experiment, storage, victim.images, None)
    alone = dataclasses.replace(task, artifact=dataclasses.replace(task.artifact, name="alone", outputs={}))
    storage.put(alone.artifact.file("members.parquet"), storage.get(victim.classifier.file("members.parquet")))
    run_trial(alone, lambda row: None)
    assert alone.artifact.digest() == victim.classifier.digest()
