"""What trained classifiers say of test images, stored once: every metric derives from it.

Input: train-classifier artifacts and test sets; of an external set, images seen in training are left out. Output:
`predictions/<name>-<fp>/<test set>.parquet`, one artifact a classifier and test set, so that a test set more is all
that is predicted. Beside `fidelity`, the only place that opens a test split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact
from raysynth.core.cache import local_folder
from raysynth.core.config import arms, external_data, keys_of_test_set
from raysynth.core.errors import DataError
from raysynth.core.evidence import Evaluation
from raysynth.core.experiment import Experiment
from raysynth.core.identity import content_digest
from raysynth.core.presets import resolve_classifier
from raysynth.core.progress import Progress, say
from raysynth.core.schemas import LABEL, from_parquet, label_names, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.predictions import judged, truth, with_probabilities
from raysynth.data.seen import COLUMNS, seen_among
from raysynth.metrics.thresholds import choose_thresholds
from raysynth.stages.adoption import seen_by_given
from raysynth.stages.ingest import ingest, ingest_artifact, load_table, load_vocabulary
from raysynth.stages.train_classifier import Trial
from raysynth.stages.views import build_view, open_view_folder

STAGE = "predictions"
STAGE_VERSION = 3
SEEN = "are train or val images of `data`, were seen by a given generator, or show such a patient"
"""Why images of an external set are not judged."""


@dataclass(frozen=True)
class TestSet:
    """Images that classifiers are judged on."""

    name: str
    images: Artifact
    """The ingest artifact."""
    experiment: Experiment
    """Whose `data` section made it."""
    ids: list[str]
    seen: int = 0
    """Images of an external set that are not among `ids`, because they or their patients were seen in training."""


def external_sets(e: Experiment, storage: Storage) -> dict[str, tuple[Experiment, Artifact]]:
    """`external_set` of every external test set."""
    return {name: external_set(e, storage, name) for name in e.evaluation.test_sets}


def external_set(e: Experiment, storage: Storage, name: str) -> tuple[Experiment, Artifact]:
    """The experiment whose `data` section is the external test set's own, and its ingest artifact, whether or not that
    exists yet. Raises DataError where its source cannot be listed."""
    external = external_data(e, name)
    with keys_of_test_set(e, name):
        return external, ingest_artifact(external, storage, tested=True)[0]


def ingest_test_sets(e: Experiment, storage: Storage, images: Artifact, connect: Callable[[], object]) -> None:
    """Ingests the external test sets that have not been, and says which of their images are not judged.

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
                artifact = ingest(external, storage, tested=True)
            _say_left_out(e, storage, images, name, external, artifact)


def _say_left_out(
    e: Experiment, storage: Storage, images: Artifact, name: str, external: Experiment, artifact: Artifact
) -> None:
    """Says how many images of an external set are left out of every metric; DataError where all are."""
    table, kind = load_table(storage, artifact), e.data.labels.kind
    classes, found = load_vocabulary(storage, images)["classes"], label_names(table.schema)
    pictures, patients = _seen(e, storage, images, external, artifact)
    seen = pictures | patients
    strange = ~judged(truth(table, name, classes, external.data.labels.policy, kind)) & ~seen
    of_all = f"of {len(seen):,} images"
    if (seen | strange).all() and seen.any():
        others = "; none of the others can be judged" if strange.any() else ""
        raise DataError(
            "data", f"{seen.sum():,} {of_all} that {SEEN}{others}", "a test set of which some images are left to judge",
            "The test split of `data` is judged without being named. Where other people only have the same patient "
            "names, give the set a `dataset` of its own.",
        )  # fmt: skip
    if strange.all():
        one = ", one an image" if kind == "single" else ""
        raise DataError(
            "data.labels.classes", ", ".join(found), f"some of those of `data` ({', '.join(classes)}){one}",
            "None of its images could be judged. Give its classes the names that they have in `data`.",
        )  # fmt: skip
    if seen.any():
        by_name = (f"; {patients.sum():,} of them by the patient's name alone: where these are other people, give the "
                   "set a `dataset` of its own") if patients.any() else ""  # fmt: skip
        say(f"test set {name}: {seen.sum():,} {of_all} {SEEN}; they are left out of every metric{by_name}")
    if strange.any():
        left = table.filter(pa.array(strange))
        of = {c: pc.sum(pc.equal(left[LABEL + c], 1)).as_py() for c in found if c not in classes}
        words = ", ".join(f"{c} {n:,}" for c, n in of.items() if n)
        say(f"test set {name}: {left.num_rows:,} {of_all} cannot be judged and are left out of every metric"
            + (f"; of classes that are not trained on: {words}" if words else ""))  # fmt: skip


def _seen(
    e: Experiment, storage: Storage, images: Artifact, external: Experiment, artifact: Artifact
) -> tuple[np.ndarray, np.ndarray]:
    """`seen_among` of an external set that is ingested: what some arm may train on, and so none is judged on, is every
    image of the train and val splits, and what a given generator is known to have seen."""
    own = from_parquet(storage.get(images.file("table.parquet")), [*COLUMNS, "split"])
    tables = [own.filter(pc.not_equal(own["split"], "test")), *_seen_by_given_generators(e, storage)]
    data, same = e.data, _source(external) == _source(e)
    return seen_among(
        from_parquet(storage.get(artifact.file("table.parquet")), COLUMNS),
        pa.concat_tables([t.select([c for c in COLUMNS if c in t.column_names]) for t in tables],
                         promote_options="default"),
        (data if same else external.data).dataset or (e if same else external).name,
        artifact.run_info()["counts"]["patients_by"] == "column", same,
    )  # fmt: skip


def _source(e: Experiment) -> tuple[str, str]:
    return e.data.kind, e.data.path


def _seen_by_given_generators(e: Experiment, storage: Storage) -> list[pa.Table]:
    changed = [key for keys in (e.sweep.factors, *e.sweep.chosen.values()) for key in keys or {}]
    # Building the arms takes 20 ms each, and few sweeps have another generator in one of them.
    trials = [e, *(a.experiment for a in arms(e))] if any(k.split(".")[0] == "generator" for k in changed) else [e]
    given = {t.generator.path: t for t in trials if t.generator.path and t.generator.kind != "external"}
    return [seen for t in given.values() if (seen := seen_by_given(t, storage)) is not None]


def open_test_sets(e: Experiment, storage: Storage, images: Artifact) -> list[TestSet]:
    """The test split of `data`, and of each external set what was not seen in training.

    Raises:
        DataError: the test split has no image.
        EnvironmentFault: the images, or an external set's, have not been ingested.
    """
    images.digest()
    table = from_parquet(storage.get(images.file("table.parquet")), ["image_id", "split"])
    own = table.filter(pc.equal(table["split"], "test"))["image_id"].to_pylist()
    if not own:
        raise DataError("data.split.test", "no test image", "at least one", "Raise data.split.test.")
    return [TestSet("test", images, e, own), *(open_test_set(e, storage, images, n) for n in e.evaluation.test_sets)]


def open_test_set(e: Experiment, storage: Storage, images: Artifact, name: str) -> TestSet:
    """An external set without the images that were seen in training. Raises EnvironmentFault as `open_test_sets`."""
    external, artifact = external_set(e, storage, name)
    artifact.digest()
    seen = np.logical_or(*_seen(e, storage, images, external, artifact))
    ids = from_parquet(storage.get(artifact.file("table.parquet")), ["image_id"])["image_id"]
    return TestSet(name, artifact, external, ids.filter(pa.array(~seen)).to_pylist(), int(seen.sum()))


def predictions_artifact(trial: Trial, test_set: TestSet) -> Artifact:
    """Where one classifier's predictions on one test set are."""
    inputs = {"classifier": trial.classifier.digest(), "images": test_set.images.digest()}
    # The label policy decides the truth that is stored beside the probabilities.
    policy = {k: v for k, v in test_set.experiment.data.labels.policy.items() if v != "ignore"}
    config: dict[str, Any] = {"test_set": test_set.name, "policy": policy}
    if test_set.seen:  # what is left depends on other images than the set's
        config["ids"] = content_digest((i, "") for i in test_set.ids)
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
