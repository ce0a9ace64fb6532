"""Tasks on GPUs: what Ray is asked for, the seconds that are recorded, and what is said when memory is short."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment, load_experiment
from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.core.storage import open_storage
from raysynth.metrics.distances import Moments
from raysynth.models import classifier_export
from raysynth.stages import classifier_loop, fidelity, predictions, train_classifier, train_generator, training_loop
from raysynth.stages.cluster import Resources
from raysynth.stages.train_generator import generator_artifact
from tests.digits import digit_artifact
from tests.unit.stages.test_evaluate import Viewed

JOBS = Path(__file__).parents[3] / "jobs"
OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation.")


class Asked(Exception):
    """Enough is known."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Ray's remote functions, as they were made; the first ends the test's call."""
    functions: list[Any] = []
    real = ray.remote

    def remote(**options: Any) -> Callable[[Any], Any]:
        def wrap(function: Any) -> Any:
            functions.append(real(**options)(function))
            asked = SimpleNamespace(remote=stop)
            return SimpleNamespace(remote=stop, options=lambda **_: asked)

        return wrap

    def stop(*_: object) -> None:
        raise Asked

    monkeypatch.setattr(ray, "remote", remote)
    return functions


@pytest.mark.parametrize("gpu", [True, False])
def test_a_worker_that_trained_on_a_gpu_is_not_used_again(
    made: list[Any], monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    import ray.util.queue

    monkeypatch.setattr(ray.util.queue, "Queue", lambda **_: SimpleNamespace(put=None))
    task: Any = SimpleNamespace(
        artifact=SimpleNamespace(complete=False), facts={"strategy": "real"}, counts={"n_real": 1, "n_synth": 0},
        classifier=SimpleNamespace(steps=1, batch_size=1), compute=Compute(), gpu=gpu,
    )  # fmt: skip
    with pytest.raises(Asked):
        train_classifier.train_classifier(task)
    assert made[0]._default_options.get("max_calls") == (1 if gpu else None)


@pytest.mark.parametrize("gpu", [True, False])
def test_a_worker_that_predicted_on_a_gpu_is_not_used_again(
    made: list[Any], monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0 * gpu})
    monkeypatch.setattr(
        predictions, "predictions_artifact", lambda *_: SimpleNamespace(path="predictions/x", complete=False)
    )
    e = build_experiment({"name": "d", "data": {"kind": "digits"}, "classifier": {}, "compute": {"trial_gpus": 0.5}})
    monkeypatch.setattr(predictions, "build_view", lambda *_: SimpleNamespace(path="view/x"))
    classifier = SimpleNamespace(path="train-classifier/x", digest=lambda: "x")
    trial: Any = SimpleNamespace(experiment=e, classifier=classifier)
    test: Any = SimpleNamespace(name="test", experiment=e, images=None, ids=[])
    with pytest.raises(Asked):
        predictions.predict_missing(e, None, [trial], [test])  # type: ignore[arg-type]
    options = made[0]._default_options
    assert (options["num_gpus"], options.get("max_calls")) == ((0.5, 1) if gpu else (0, None))


@pytest.mark.parametrize(("gpu", "gpu_seconds"), [(True, 480.0), (False, 0.0)])
def test_every_process_that_trains_a_generator_holds_its_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool, gpu_seconds: float
) -> None:
    storage = open_storage(str(tmp_path))
    images = digit_artifact(storage, 120)
    e = build_experiment({
        "name": "d", "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "generator": {"train_on": "train"},
    })  # fmt: skip
    artifact = generator_artifact(e, storage, images)
    for name, content in (
        ("export.json", "{}"), ("export/generator.json", json.dumps({"weights_sha256": "w"})),
        ("log/loss.jsonl", json.dumps({"step": 60, "steps_per_s": 0.5}) + "\n"),
    ):  # fmt: skip
        storage.put(artifact.file(name), content.encode())
    monkeypatch.setattr(train_generator, "_workers", lambda *_: (4, gpu))
    monkeypatch.setattr(train_generator, "build_view", lambda *_: SimpleNamespace(path="view/x"))
    run = train_generator.train_generator(e, storage, images).run_info()
    assert (run["train_seconds"], run["gpu_seconds"], run["views"]) == (120.0, gpu_seconds, ["view/x"])


@pytest.mark.parametrize(("gpus", "device"), [(0.5, "cuda"), (0.0, "cpu")])
def test_predicting_holds_its_share_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: float, device: str
) -> None:
    def load(folder: str, on: str) -> Any:
        assert on == device
        time.sleep(0.2)
        facts = {"classes": ["c0"], "kind": "multi"}
        return SimpleNamespace(facts=facts, predict=lambda images: np.zeros((len(images), 1)))

    monkeypatch.setattr(predictions, "local_folder", lambda *_: tmp_path)
    monkeypatch.setattr(predictions, "open_view_folder", lambda *_: Viewed())
    monkeypatch.setattr(classifier_export, "load_classifier", load)
    storage = open_storage(str(tmp_path))
    config = {"test_set": "test", "policy": {}}
    artifact = replace(Artifact.at(storage, "predictions", "x", 1, config, {}), started=time.time() - 1000)
    predictions.predict(storage, "model", [(artifact, "view")], "cache", gpus)
    run = artifact.run_info()
    assert 0.2 * gpus <= run["gpu_seconds"] <= 60 * gpus, "waiting for a GPU is not using it"
    assert (run["seconds"] < 60, run["views"]) == (True, ["view"])


@pytest.mark.parametrize(("gpus", "gpu_seconds"), [(2, 12.0), (0, 0.0)])
def test_every_piece_of_features_holds_a_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int, gpu_seconds: float) -> None:
    part = np.random.default_rng(0).random((4, 2))
    monkeypatch.setattr(fidelity, "extract_piece", lambda *_: (Moments.of(part), part, "x", "w", 3.0))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: SimpleNamespace(remote=function))
    monkeypatch.setattr(ray, "get", lambda piece: piece)
    evaluation = {"fidelity": {"extractor": "inception"}}
    e = build_experiment({"name": "d", "data": {"kind": "digits"}, "evaluation": evaluation})
    many = pa.table({"image_id": [str(i) for i in range(fidelity.PIECE + 1)]})
    resources = Resources(cpus=2, gpus=gpus, nodes=1)
    *_, seconds = fidelity._extract(e, None, resources, ["a", "b"], [many, many])  # type: ignore[arg-type]
    assert seconds == gpu_seconds


@pytest.mark.parametrize(("gpus", "accumulation", "workers"), [(1, 4, 1), (1, 1, 1), (2, 2, 2), (4, 1, 4)])
def test_the_recipe_trains_on_any_number_of_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, accumulation: int, workers: int
) -> None:
    e = load_experiment(str(JOBS / "xray/gpu.yaml"), [f"compute.train_accumulation={accumulation}"])
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": float(gpus)}}])
    assert train_generator._workers(e.generator, e.compute) == (workers, True)


def trained(monkeypatch: pytest.MonkeyPatch, world: int, error: Exception) -> dict[str, Any]:
    """The generator's train function in a group of `world` processes, where its work raises `error`."""
    import ray.train

    def fails(*_: object) -> None:
        raise error

    context = SimpleNamespace(
        get_world_size=lambda: world, get_world_rank=lambda: 0, get_local_world_size=lambda: world
    )
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(training_loop, "_train", fails)
    return training_loop.train({"task": SimpleNamespace(compute=Compute()), "gpu": False})


def test_a_generator_that_takes_too_much_memory_names_the_key_and_is_not_restarted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    returned = trained(monkeypatch, 1, OUT)
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in returned["fault"]
    monkeypatch.setattr(train_generator, "fit", lambda *_: returned)
    with pytest.raises(EnvironmentFault, match=r"takes more memory .* Raise compute\.train_accumulation"):
        train_generator._fit(SimpleNamespace(compute=Compute()), SimpleNamespace(), 1, False)  # type: ignore[arg-type]


def test_of_several_processes_an_error_ends_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentFault, match=r"Raise compute\.train_accumulation"):
        trained(monkeypatch, 2, OUT)


def test_other_errors_are_left_to_ray_train(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError("connection lost"), EnvironmentFault("the root is gone")):
        with pytest.raises(type(error)) as caught:
            trained(monkeypatch, 1, error)
        assert caught.value is error


def test_a_classifier_that_takes_too_much_memory_names_the_keys() -> None:
    loop: Any = object.__new__(classifier_loop.Loop)

    def fails() -> None:
        raise OUT

    loop._run = fails
    with pytest.raises(EnvironmentFault, match=r"allocate 2.00 GiB.*classifier\.batch_size.*classifier_workers"):
        loop.run()
