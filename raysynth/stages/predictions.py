"""What trained classifiers say of test images, stored once: every metric derives from it.

Input: train-classifier artifacts and test sets. Output: `predictions/<name>-<fp>/<test set>.parquet`, one artifact a
classifier. Beside `fidelity`, the only place that opens a test split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact
from raysynth.core.cache import local_folder
from raysynth.core.config import external_data, keys_of_test_set
from raysynth.core.errors import DataError
from raysynth.core.evidence import Evaluation
from raysynth.core.experiment import Experiment
from raysynth.core.presets import resolve_classifier
from raysynth.core.progress import Progress
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.predictions import truth, with_probabilities
from raysynth.metrics.thresholds import choose_thresholds
from raysynth.stages.ingest import ingest, ingest_artifact
from raysynth.stages.train_classifier import Trial
from raysynth.stages.views import build_view, open_view_folder

STAGE = "predictions"
STAGE_VERSION = 2


@dataclass(frozen=True)
class TestSet:
    """Images that classifiers are judged on."""

    name: str
    images: Artifact
    """The ingest artifact."""
    experiment: Experiment
    """Whose `data` section made it."""
    ids: list[str]


def external_sets(e: Experiment, storage: Storage) -> dict[str, tuple[Experiment, Artifact]]:
    """Name of each external test set -> the experiment whose `data` section is its own, and its ingest artifact,
    whether or not that exists yet. Raises DataError where its source cannot be listed."""
    found = {}
    for name in e.evaluation.test_sets:
        external = external_data(e, name)
        with keys_of_test_set(name):
            found[name] = external, ingest_artifact(external, storage)[0]
    return found


def ingest_test_sets(e: Experiment, storage: Storage, connect: Callable[[], object]) -> None:
    """Ingests the external test sets that have not been.

    Args:
        connect: connects Ray; called only where there is something to ingest.
    """
    for name, (external, artifact) in external_sets(e, storage).items():
        if not artifact.complete:
            connect()
            with keys_of_test_set(name):
                ingest(external, storage)


def open_test_sets(e: Experiment, storage: Storage, images: Artifact) -> list[TestSet]:
    """The test split of `data`, and every image of each external set.

    Raises:
        DataError: the test split has no image.
        EnvironmentFault: the images, or an external set's, have not been ingested.
    """
    images.digest()
    table = from_parquet(storage.get(images.file("table.parquet")))
    own = table.filter(pc.equal(table["split"], "test"))["image_id"].to_pylist()
    if not own:
        raise DataError("data.split.test", "no test image", "at least one", "Raise data.split.test.")
    found = [TestSet("test", images, e, own)]
    for name, (external, artifact) in external_sets(e, storage).items():
        artifact.digest()
        ids = from_parquet(storage.get(artifact.file("table.parquet")), ["image_id"])["image_id"].to_pylist()
        found.append(TestSet(name, artifact, external, ids))
    return found


def predictions_artifact(trial: Trial, sets: Sequence[TestSet]) -> Artifact:
    """Where one classifier's predictions on these test sets are."""
    inputs = {"classifier": trial.classifier.digest(), **{f"test set {t.name}": t.images.digest() for t in sets}}
    name = trial.classifier.name
    # The label policy decides the truth that is stored beside the probabilities.
    policies = {t.name: t.experiment.data.labels.policy for t in sets}
    config = {"sets": {name: {k: v for k, v in p.items() if v != "ignore"} for name, p in policies.items()}}
    return Artifact.at(trial.classifier.storage, STAGE, name, STAGE_VERSION, config, inputs)


def predict_missing(e: Experiment, storage: Storage, trials: Sequence[Trial], sets: Sequence[TestSet]) -> None:
    """Predicts with every classifier whose predictions are not there; Ray must be connected."""
    import ray

    missing = {predictions_artifact(t, sets).path: t for t in trials if not predictions_artifact(t, sets).complete}
    if not missing:
        return
    views: dict[tuple[str, int], str] = {}
    work = []
    for trial in missing.values():
        c = trial.experiment.classifier
        assert c is not None
        size = int(resolve_classifier(c, trial.experiment.data.image).size or 0)
        for t in sets:
            if (t.name, size) not in views:
                views[t.name, size] = build_view(t.experiment, storage, t.images, size, t.ids).path
        folders = {t.name: views[t.name, size] for t in sets}
        work.append((trial, predictions_artifact(trial, sets), folders))
    gpu = e.compute.use_gpu is not False and ray.cluster_resources().get("GPU", 0) >= 1
    gpus = e.compute.trial_gpus if gpu else 0.0
    # Given here, not in options(): only then does Ray end a worker that initialised CUDA on its GPU.
    remote = ray.remote(max_retries=3, num_cpus=1, num_gpus=gpus)(predict)
    waiting = {remote.remote(storage, f"{t.classifier.path}/model", a, f, e.compute.cache, gpus) for t, a, f in work}
    with Progress("predict", len(waiting), "classifiers") as progress:
        while waiting:
            done, rest = ray.wait(list(waiting), timeout=5)
            ray.get(done)
            waiting = set(rest)
            progress.advance(len(done))


def predict(
    storage: Storage, model: str, artifact: Artifact, views: Mapping[str, str], cache: str, gpus: float
) -> None:
    """Writes one classifier's predictions on every test set; runs in a Ray task.

    Args:
        model: folder of the exported classifier, below the root.
        artifact: as of `predictions_artifact`; the truth follows the label policies in its identity.
        views: test set -> folder of its view, below the root.
        gpus: that the task holds; 0: it predicts on the CPU.
    """
    from raysynth.models.classifier_export import load_classifier

    began = time.monotonic()
    predictor = load_classifier(str(local_folder(storage, model, cache)), "cuda" if gpus else "cpu")
    classes = list(predictor.facts["classes"])
    counts = {}
    for name, folder in views.items():
        view = open_view_folder(storage, folder, cache)
        table = truth(view.index, name, classes, artifact.identity["config"]["sets"][name])
        said = [predictor.predict(view.images(range(i, min(i + 4096, len(view))))) for i in range(0, len(view), 4096)]
        artifact.put(f"{name}.parquet", to_parquet(with_probabilities(table, np.concatenate(said), classes)))
        counts[name] = len(view)
    artifact.commit(counts, gpu_seconds=gpus * (time.monotonic() - began))


def load_predictions(trial: Trial, sets: Sequence[TestSet]) -> dict[str, pa.Table]:
    """Test set -> the classifier's predictions."""
    artifact = predictions_artifact(trial, sets)
    return {t.name: from_parquet(artifact.storage.get(artifact.file(f"{t.name}.parquet"))) for t in sets}


def thresholds_of(trial: Trial, evaluation: Evaluation) -> dict[str, float]:
    """Finding -> threshold, chosen on the classifier's real validation images and frozen."""
    data = trial.classifier.storage.get(trial.classifier.file("validation.parquet"))
    return choose_thresholds(from_parquet(data), evaluation.threshold_rule)
