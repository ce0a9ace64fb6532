"""Training on Ray Train: what a run leaves, and that a killed run goes on to the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import ConfigError, EnvironmentFault
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.data.conditions import ConditionSpec
from raysynth.data.images import decode_png
from raysynth.stages import trainer
from raysynth.stages.train_generator import train_generator
from raysynth.stages.views import build_view, open_view
from tests.digits import digit_artifact, digit_images
from tests.ray.generator_driver import small_experiment
from tests.waiting import wait_for

pytestmark = pytest.mark.ray


def weights(artifact: Artifact) -> str:
    return artifact.run_info()["weights_sha256"]


def curve(artifact: Artifact) -> list[dict]:
    text = artifact.storage.get(artifact.file("log/loss.jsonl")).decode()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same training, never interrupted, in this process (Ray Train's local mode)."""
    place = tmp_path_factory.mktemp("whole")
    experiment = small_experiment(str(place / "runs"), str(place / "cache"), train_workers=0)
    storage = open_storage(experiment.root)
    return train_generator(experiment, storage, digit_artifact(storage))


def test_what_a_run_leaves(uninterrupted: Artifact) -> None:
    storage = uninterrupted.storage
    names = {e.path.removeprefix(uninterrupted.path + "/") for e in storage.list(uninterrupted.path)}
    events = {n for n in names if n.startswith("log/events.")}
    assert events
    assert names - events == {
        "_SUCCESS", "run.json", "config.yaml", "export.json", "log/loss.jsonl", "seen.parquet",
        "samples/00000075.png", "samples/00000150.png",
        "export/README.md", "export/condition.json", "export/generator.json", "export/scheduler/scheduler_config.json",
        "export/unet/config.json", "export/unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    info = uninterrupted.run_info()
    assert info["counts"] == {"n_real_generator": 90, "steps": 150}
    assert set(info["outputs"]) == {n for n in names if n.startswith("export/")} | {"seen.parquet"}
    seen = from_parquet(storage.get(uninterrupted.file("seen.parquet")))
    assert len(set(seen["image_id"].to_pylist())) == 90
    facts = json.loads(storage.get(uninterrupted.file("export/generator.json")))
    assert facts["n_real_generator"] == 90
    assert facts["train_on"] == "train"
    spec = ConditionSpec.from_json(storage.get(uninterrupted.file("export/condition.json")))
    assert spec.attributes == {"sex": ["F", "M"]}
    assert spec.policy == {"0": "zeros"}
    rows = curve(uninterrupted)
    assert [r["step"] for r in rows][-2:] == [140, 150]
    assert np.mean([r["loss"] for r in rows[-3:]]) < 0.75 * rows[0]["loss"]
    grid = decode_png(storage.get(uninterrupted.file("samples/00000150.png")))
    assert grid.shape == (80, 32, 1)
    assert grid.std() > 10


def test_a_finished_generator_is_returned_at_once(uninterrupted: Artifact) -> None:
    root = uninterrupted.storage.root
    images = digit_artifact(uninterrupted.storage)
    before = {e.path: e for e in uninterrupted.storage.list()}
    again = train_generator(small_experiment(root, root), uninterrupted.storage, images)
    assert again.path == uninterrupted.path
    assert {e.path: e for e in uninterrupted.storage.list()} == before


def test_the_view_has_the_wanted_images_once(ray_session: None, tmp_path: Path) -> None:
    experiment = small_experiment(str(tmp_path / "runs"), str(tmp_path / "cache"))
    storage = open_storage(experiment.root)
    images = digit_artifact(storage, 40, parts=3)
    ids = [f"digit-{i:04d}" for i in (3, 39, 0, 17)]
    view = open_view(build_view(experiment, storage, images, 8, ids), experiment.compute.cache)
    assert sorted(view.index["image_id"].to_pylist()) == sorted(ids)
    for position, name in enumerate(view.index["image_id"].to_pylist()):
        assert (view.images([position])[0] == digit_images()[0][int(name[-4:])]).all()
    larger = build_view(experiment, storage, images, 16, ids)
    assert open_view(larger, experiment.compute.cache).images([0]).shape == (1, 16, 16, 1)


def test_a_batch_that_cannot_be_shared_is_refused(ray_session: None, tmp_path: Path) -> None:
    experiment = small_experiment(str(tmp_path), str(tmp_path), train_workers=2, train_accumulation=8)
    storage = open_storage(experiment.root)
    object.__setattr__(experiment.generator, "batch_size", 24)
    with pytest.raises(ConfigError, match=r"generator.batch_size: got 24.*16"):
        train_generator(experiment, storage, digit_artifact(storage))


def test_more_workers_than_fit_are_refused_at_once(ray_session: None, tmp_path: Path) -> None:
    experiment = small_experiment(str(tmp_path), str(tmp_path), train_workers=8)
    storage = open_storage(experiment.root)
    with pytest.raises(EnvironmentFault, match=r"compute.train_workers: got 8, must be at most 4.*1 CPU each.*Lower"):
        train_generator(experiment, storage, digit_artifact(storage))


def test_a_loss_that_diverges_names_the_learning_rate(ray_session: None, tmp_path: Path) -> None:
    experiment = small_experiment(str(tmp_path / "runs"), str(tmp_path / "cache"), train_workers=0)
    object.__setattr__(experiment.generator, "lr", 1e30)
    storage = open_storage(experiment.root)
    with pytest.raises(ConfigError, match=r"generator.lr: got 1e\+30.*not finite at step 10\. Try a third"):
        train_generator(experiment, storage, digit_artifact(storage))
    assert not any(e.path.endswith(("_SUCCESS", "training.pt")) for e in storage.list("train-generator"))


def checkpointed(storage: Storage) -> bool:
    return any(e.path.endswith("checkpoints/training.pt") for e in storage.list("train-generator"))


def own_train_worker() -> int | None:
    """Process id of a Train worker of this process's own Ray: its parent raylet is our child."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
    for pid, (parent, command) in found.items():
        if command.startswith("ray::") and "RayTrainWorker" in command and found.get(parent, (0, ""))[0] == os.getpid():
            return pid
    return None


def test_a_killed_worker_goes_on_to_the_same_weights(uninterrupted: Artifact, tmp_path: Path) -> None:
    experiment = small_experiment(str(tmp_path / "runs"), str(tmp_path / "cache"))
    storage = open_storage(experiment.root)
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: checkpointed(storage))
        pid = own_train_worker()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    artifact = train_generator(experiment, storage, digit_artifact(storage))
    killer.join(10)
    assert killed
    assert weights(artifact) == weights(uninterrupted)
    steps = [r["step"] for r in curve(artifact)]
    assert steps == sorted(set(steps))  # steps that were trained again are logged once
    assert steps[-1] == 150


def test_a_killed_and_an_interrupted_driver_go_on_to_the_same_weights_on_s3(
    uninterrupted: Artifact, s3_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, cache, said = open_storage(s3_root), str(tmp_path / "cache"), tmp_path / "said.txt"
    command = [sys.executable, "-m", "tests.ray.generator_driver", s3_root, cache, "1"]

    def drive(until: Callable[[], bool], then: signal.Signals) -> int:
        with open(said, "w") as out:
            driver = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=out, stderr=out)
            wait_for(lambda: until() or driver.poll() is not None)
            driver.send_signal(then)
            return driver.wait(60)

    assert drive(lambda: checkpointed(storage), signal.SIGKILL) == -signal.SIGKILL, said.read_text()
    assert not any(e.path.endswith("_SUCCESS") for e in storage.list("train-generator"))
    # Ray Train would take Ctrl-C over, and end without words.
    assert drive(lambda: "continues at step" in said.read_text(), signal.SIGINT) == 130, said.read_text()
    assert "the same command goes on from here" in said.read_text()
    assert "90 real images (train: 0 1" in said.read_text()
    # What a Train worker had saved, the driver's own process goes on from.
    artifact = train_generator(small_experiment(s3_root, cache, train_workers=0), storage, digit_artifact(storage))
    assert "continues at step" in capsys.readouterr().out
    assert weights(artifact) == weights(uninterrupted)
    steps = [r["step"] for r in curve(artifact)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 150


@pytest.mark.parametrize("dashboard", [False, True])
def test_no_run_waits_for_a_dashboard_that_is_not_there(
    uninterrupted: Artifact, monkeypatch: pytest.MonkeyPatch, dashboard: bool
) -> None:
    def callbacks(work: Any) -> Any:
        return SimpleNamespace(return_value={type(c).__name__ for c in work.__self__._create_default_callbacks()})

    if dashboard:
        monkeypatch.setattr(trainer, "has_dashboard", lambda: True)
    names = trainer.fit("stage", len, {}, uninterrupted, 1, {"CPU": 1}, False, callbacks)
    assert "BackendSetupCallback" in names
    assert ("PlacementGroupCleanerCallback" in names) == dashboard


def test_two_workers_train_what_one_trains(uninterrupted: Artifact, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    experiment = small_experiment(str(tmp_path / "runs"), cache, train_workers=2, train_accumulation=2)
    storage = open_storage(experiment.root)
    pair = curve(train_generator(experiment, storage, digit_artifact(storage)))
    alone = curve(uninterrupted)
    assert [r["step"] for r in pair] == sorted({*range(10, 151, 10), *range(25, 151, 25)})
    # Sums in another order drift apart; the first steps are the same ones.
    by_step = {r["step"]: r["loss"] for r in alone}
    for row in pair[:3]:
        assert row["loss"] == pytest.approx(by_step[row["step"]], rel=2e-3)
