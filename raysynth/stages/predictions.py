"""What trained classifiers say of test images, stored once: every metric derives from it.

Input: train-classifier artifacts and test sets. Output: `predictions/<name>-<fp>/<test set>.parquet`, one artifact a
classifier and test set, so that a test set more is all that is predicted. Beside `fidelity`, the only place that opens
a test split.
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
from raysynth.core.progress import Progress, say
from raysynth.core.schemas import LABEL, from_parquet, label_names, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.predictions import judged, truth, with_probabilities
from raysynth.metrics.thresholds import choose_thresholds
from raysynth.stages.ingest import ingest, ingest_artifact, load_table, load_vocabulary
from raysynth.stages.train_classifier import Trial
from raysynth.stages.views import build_view, open_view_folder

STAGE = "predictions"
STAGE_VERSION = 3


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
        with keys_of_test_set(e, name):
            found[name] = external, ingest_artifact(external, storage)[0]
    return found


def ingest_test_sets(e: Experiment, storage: Storage, images: Artifact, connect: Callable[[], object]) -> None:
    """Ingests the external test sets that have not been, and says which of their images cannot be judged.

    Args:
        images: the ingest artifact of `data`, whose classes are what the classifiers know.
        connect: connects Ray; called only where there is something to ingest.

    Raises:
        DataError: a set cannot be used as described, or no image of it can be judged.
        EnvironmentFault: `images` is not complete.
    """
    for name, (external, artifact) in external_sets(e, storage).items():
        images.digest()
        with keys_of_test_set(e, name):
            if not artifact.complete:
                connect()
                artifact = ingest(external, storage)
            classes, kind = load_vocabulary(storage, images)["classes"], e.data.labels.kind
            _say_not_judged(name, load_table(storage, artifact), classes, external.data.labels.policy, kind)


def _say_not_judged(name: str, table: pa.Table, classes: Sequence[str], policy: Mapping[str, str], kind: str) -> None:
    """Says how many images of an external set are left out of every metric; DataError where all are."""
    out = ~judged(truth(table, name, classes, policy, kind))
    found = label_names(table.schema)
    if out.all():
        one = ", one an image" if kind == "single" else ""
        raise DataError(
            "data.labels.classes", ", ".join(found), f"some of those of `data` ({', '.join(classes)}){one}",
            "None of its images could be judged. Give its classes the names that they have in `data`.",
        )  # fmt: skip
    if out.any():
        left = table.filter(pa.array(out))
        of = {c: pc.sum(pc.equal(left[LABEL + c], 1)).as_py() for c in found if c not in classes}
        strange = ", ".join(f"{c} {n:,}" for c, n in of.items() if n)
        say(f"test set {name}: {left.num_rows:,} of {len(out):,} images cannot be judged and are left out of every "
            "metric" + (f"; of classes that are not trained on: {strange}" if strange else ""))  # fmt: skip


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


def predictions_artifact(trial: Trial, test_set: TestSet) -> Artifact:
    """Where one classifier's predictions on one test set are."""
    inputs = {"classifier": trial.classifier.digest(), "images": test_set.images.digest()}
    # The label policy decides the truth that is stored beside the probabilities.
    policy = {k: v for k, v in test_set.experiment.data.labels.policy.items() if v != "ignore"}
    config = {"test_set": test_set.name, "policy": policy}
    return Artifact.at(trial.classifier.storage, STAGE, trial.classifier.name, STAGE_VERSION, config, inputs)


def predict_missing(e: Experiment, storage: Storage, trials: Sequence[Trial], sets: Sequence[TestSet]) -> None:
    """Predicts what is not predicted yet, one task a classifier; Ray must be connected."""
    import ray

    views: dict[tuple[str, int], str] = {}
    work = []
    for trial in {t.classifier.digest(): t for t in trials}.values():
        places = [(predictions_artifact(trial, t), t) for t in sets]
        missing = [(artifact, t) for artifact, t in places if not artifact.complete]
        c = trial.experiment.classifier
        assert c is not None
        size = int(resolve_classifier(c, trial.experiment.data.image).size or 0)
        for _, t in missing:
            if (t.name, size) not in views:
                views[t.name, size] = build_view(t.experiment, storage, t.images, size, t.ids).path
        if missing:
            work.append((trial, [(artifact, views[t.name, size]) for artifact, t in missing]))
    if not work:
        return
    gpu = e.compute.use_gpu is not False and ray.cluster_resources().get("GPU", 0) >= 1
    gpus = e.compute.trial_gpus if gpu else 0.0
    # Given here, not in options(): only then does Ray end a worker that initialised CUDA on its GPU.
    remote = ray.remote(max_retries=3, num_cpus=1, num_gpus=gpus)(predict)
    waiting = {remote.remote(storage, f"{t.classifier.path}/model", m, e.compute.cache, gpus) for t, m in work}
    with Progress("predict", len(waiting), "classifiers") as progress:
        while waiting:
            done, rest = ray.wait(list(waiting), timeout=5)
            ray.get(done)
            waiting = set(rest)
            progress.advance(len(done))


def predict(storage: Storage, model: str, missing: Sequence[tuple[Artifact, str]], cache: str, gpus: float) -> None:
    """Writes one classifier's predictions on some test sets; runs in a Ray task.

    Args:
        model: folder of the exported classifier, below the root.
        missing: artifacts as of `predictions_artifact`, whose identity names the test set and the label policy that
            its truth follows, each with the folder of the set's view, below the root.
        gpus: that the task holds; 0: it predicts on the CPU.
    """
    from raysynth.models.classifier_export import load_classifier

    began = time.monotonic()
    predictor = load_classifier(str(local_folder(storage, model, cache)), "cuda" if gpus else "cpu")
    classes, kind = list(predictor.facts["classes"]), predictor.facts["kind"]
    for artifact, folder in missing:
        asked = artifact.identity["config"]
        artifact.started = time.time()  # not where it was named: its task waited
        view = open_view_folder(storage, folder, cache)
        table = truth(view.index, asked["test_set"], classes, asked["policy"], kind)
        said = [predictor.predict(view.images(range(i, min(i + 4096, len(view))))) for i in range(0, len(view), 4096)]
        data = to_parquet(with_probabilities(table, np.concatenate(said), classes))
        artifact.put(f"{asked['test_set']}.parquet", data)
        now = time.monotonic()
        counts = {"images": len(view), "judged": int(judged(table).sum())}
        artifact.commit(counts, gpu_seconds=gpus * (now - began), views=[folder])
        began = now


def load_predictions(trial: Trial, test_set: TestSet) -> pa.Table:
    """The classifier's predictions on a test set."""
    artifact = predictions_artifact(trial, test_set)
    return from_parquet(artifact.storage.get(artifact.file(f"{test_set.name}.parquet")))


def thresholds_of(trial: Trial, evaluation: Evaluation) -> dict[str, float]:
    """Finding -> threshold, chosen on the classifier's real validation images and frozen."""
    data = trial.classifier.storage.get(trial.classifier.file("validation.parquet"))
    return choose_thresholds(from_parquet(data), evaluation.threshold_rule)
