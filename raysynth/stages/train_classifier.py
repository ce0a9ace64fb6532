"""Trains one classifier: chooses its training set, builds the views, trains, keeps the best of its checkpoints.

Input: an ingest artifact and, where the strategy needs one, a generate artifact. Output, under
`train-classifier/<name>-<fp>/`: `model/` (safetensors), `members.parquet` (every image trained on),
`validation.parquet` (predictions on real validation images), `log/` (history.jsonl and TensorBoard). No test image is
ever named here.

Its identity is what was trained on (the digest of the ids, labels and pixels' sources) and how, not which experiment
asked for it: a sweep's trial is this same artifact.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact, git_state
from raysynth.core.errors import ConfigError, DataError, EnvironmentFault
from raysynth.core.experiment import Experiment
from raysynth.core.identity import canonical_json, content_digest, file_digest
from raysynth.core.presets import resolve_classifier, resolve_image
from raysynth.core.progress import Progress, say
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.labels import check_policy
from raysynth.data.training_sets import Chosen, choose
from raysynth.stages.adoption import Seen, given_artifact, seen_by_generator
from raysynth.stages.classifier_task import ClassifierTask
from raysynth.stages.generated import load_index
from raysynth.stages.plan import load_plan, plan_artifact
from raysynth.stages.views import build_synthetic_view, build_view

STAGE = "train-classifier"
STAGE_VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One arm with one seed, and the classifier it is. Arms may share a classifier."""

    arm: str
    seed: int
    experiment: Experiment
    """The arm's own."""
    classifier: Artifact
    """Its train-classifier artifact."""

    @property
    def name(self) -> str:
        """Arm and seed, in words."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def facts(self) -> dict[str, Any]:
        """`trial_facts` of the trained classifier, and `gradient_steps`: those it took, early stopping included."""
        run = self.classifier.run_info()
        return {**run["facts"], "gradient_steps": run["counts"]["steps"]}


def synthetic_rows(plan: pa.Table, generated: Artifact) -> pa.Table:
    """The plan's rows that were rendered and accepted, by rank."""
    index = load_index(generated)
    ok = pa.array(index.loc[index["status"] == "ok", "row_key"], pa.string())
    return plan.filter(pc.is_in(plan["row_key"], value_set=ok))


def needs_generator(e: Experiment) -> bool:
    """Whether a classifier needs a generator: for its images or, where it was trained elsewhere, for what it saw."""
    g, t = e.generator, e.training_set
    return t.needs_synthetic or (t.strategy == "upper_bound" and bool(g.path) and g.kind != "external")


def chosen(e: Experiment, storage: Storage, images: Artifact, generated: Artifact | None) -> Chosen:
    """The training set of this experiment.

    Args:
        generated: a generate artifact that lists at least the rows that `training_set` selects.
    """
    images.digest()  # says which stage is to be run, where it is not complete
    needs = e.training_set.needs_synthetic
    if needs and generated is None:
        raise EnvironmentFault(f"strategy {e.training_set.strategy} needs synthetic images: run `raysynth generate`.")
    table = from_parquet(storage.get(images.file("table.parquet")))
    seen = rows = listed = None
    if needs and generated:
        plan = load_plan(storage, plan_artifact(e, storage, images))
        rows, listed = synthetic_rows(plan, generated), plan if e.generator.kind == "external" else None
    if e.training_set.strategy == "upper_bound" and e.generator.path:
        if needs_generator(e):
            given_artifact(e, storage).digest()  # says that it is to be copied, where it is not
        seen = seen_by_generator(e, storage, table).ids
        if seen is None:
            raise DataError(
                "training_set.strategy", "upper_bound", "another where nobody knows what generator.path was trained on",
                "An upper bound trains on the real images that the generator saw.",
            )  # fmt: skip
    return choose(e, table, rows, seen, listed)


def classifier_artifact(
    e: Experiment, storage: Storage, images: Artifact, generated: Artifact | None, members: Chosen | None = None
) -> Artifact:
    """The stage's artifact for this experiment, whether or not it exists yet. Arguments as for `chosen`."""
    if e.classifier is None:
        raise ConfigError("classifier", None, "a section", "Add `classifier: {}` for the defaults.")
    members = members or chosen(e, storage, images, generated)
    t, classifier = e.training_set, resolve_classifier(e.classifier, e.data.image)
    file = classifier.weights_file
    config: dict[str, Any] = {
        "classifier": dataclasses.replace(classifier, init="file") if file else classifier,
        "phase_steps": members.phase_steps, "real_fraction": t.real_fraction, "modality": e.data.image.preset,
        "labels": e.data.labels.kind,
        "policy": {k: v for k, v in e.data.labels.policy.items() if v != "ignore"},
    }  # fmt: skip
    if t.stages == 2:
        config["pretrain"] = t.pretrain
    inputs = {"images": images.digest(), "members": members.ids_digest}
    if file:
        inputs["init"] = file_digest(file)
    if t.needs_synthetic and generated is not None:
        # Not the artifact's own digest: a larger ratio rendered later leaves the images of this one as they are.
        run = generated.run_info()
        inputs["synthetic_set"] = content_digest([(run["synthetic_set"], canonical_json(run["render"]))])
    return Artifact.at(storage, STAGE, e.name, STAGE_VERSION, config, inputs)


def prepare(
    e: Experiment, storage: Storage, images: Artifact, generated: Artifact | None, gpu: bool = False
) -> ClassifierTask:
    """Chooses the training set, builds the views and writes `members.parquet`. Ray must be connected.

    Args:
        gpu: whether the trial will have one.
    """
    members = chosen(e, storage, images, generated)
    artifact = classifier_artifact(e, storage, images, generated, members)
    assert e.classifier is not None
    classifier = resolve_classifier(e.classifier, e.data.image)
    if classifier.weights_file:  # a worker may have another working folder
        classifier = dataclasses.replace(classifier, init=str(classifier.weights_file))
    table = from_parquet(storage.get(images.file("table.parquet")))
    classes = list(json.loads(storage.get(images.file("vocabulary.json")))["classes"])
    check_policy(e.data.labels, classes)
    size, views = int(classifier.size or 0), {}
    for name, split in (("real", "train"), ("validation", "val")):
        ids = table.filter(pc.equal(table["split"], split))["image_id"].to_pylist()
        views[name] = build_view(e, storage, images, size, ids).path
    if e.training_set.needs_synthetic and generated is not None:
        views["synthetic"] = build_synthetic_view(e, storage, generated, size).path
    shown = e.training_set.needs_synthetic or e.training_set.strategy == "upper_bound"
    seen = seen_by_generator(e, storage, table) if shown else Seen(0, frozenset(), None)
    data = to_parquet(members.members)
    if not artifact.complete:
        storage.put(artifact.file("members.parquet"), data)
    return ClassifierTask(
        artifact, classifier, e.training_set.pretrain, e.training_set.real_fraction, members.phase_steps, views,
        classes, e.data.labels.kind, dict(e.data.labels.policy), e.data.image.preset,
        1 if resolve_image(e.data.image).channels == "grey" else 3, members.validation,
        {"n_real": members.n_real, "n_synth": members.n_synth, "n_validation": len(members.validation),
         "n_missing": members.n_missing},
        trial_facts(e, generated, members, seen), e.compute, gpu, {"command": sys.argv, "git": git_state()},
    )  # fmt: skip


def trial_facts(e: Experiment, generated: Artifact | None, members: Chosen, seen: Seen) -> dict[str, Any]:
    """The columns of the metric table that are the same for every metric of this classifier.

    Args:
        seen: what the generator was trained on; images of it that nobody can name count as not the classifier's.
    """
    t, c = e.training_set, e.classifier
    assert c is not None
    used = t.needs_synthetic and generated is not None
    trained = {i for i, s in zip(*(members.members[n].to_pylist() for n in ("id", "source")), strict=True)
               if s == "real"}  # fmt: skip
    rendered = used and e.generator.kind != "external"  # elsewhere it was sampled otherwise
    generated_run = generated.run_info() if used and generated is not None else {}
    return {
        "architecture": c.architecture, "init": c.init, "strategy": t.strategy,
        "ratio": members.n_synth / members.n_real if members.n_real else None,
        "n_real": members.n_real, "n_synth": members.n_synth, "n_validation": len(members.validation),
        "n_real_generator": seen.count if used else None, "train_on": seen.train_on if used else None,
        "n_unseen": _unseen(seen, trained) if used else 0,
        "generator_id": generated_run.get("generator", "").rpartition("/")[2] or None,
        "synthetic_set": generated_run.get("synthetic_set"),
        "guidance_scale": e.sampling.guidance_scale if rendered else None,
        "sampling_steps": e.sampling.steps if rendered else None,
        "batch_size": c.batch_size, "seed_split": e.data.split.seed, "seed_subset": t.seed,
        "seed_generator": e.generator.seed if used and not e.generator.path else None, "seed_classifier": c.seed,
        "fold": None,
        "notes": members.notes,
    }  # fmt: skip


def _unseen(seen: Seen, trained: set[str]) -> int | None:
    """Real images that the generator saw and the classifier did not; None where nobody knows."""
    if seen.count is None or seen.ids is None:
        return None
    return seen.count - len(seen.ids & trained)


def train_classifier(task: ClassifierTask) -> Artifact:
    """Trains one classifier on its own, in a process of Ray with the trial's resources, with a progress line."""
    import ray
    from ray.util.queue import Queue

    from raysynth.stages.classifier_trial import run_trial

    if task.artifact.complete:
        say(f"{STAGE}: {task.artifact.path} is complete")
        return task.artifact
    say(f"{STAGE}: {task.facts['strategy']}, {task.counts['n_real']:,} real and {task.counts['n_synth']:,} synthetic "
        f"images, {task.classifier.steps:,} steps of {task.classifier.batch_size}")  # fmt: skip
    queue: Any = Queue(actor_options={"num_cpus": 0})
    with Progress(STAGE, task.classifier.steps, "steps") as progress:
        # Given here, not in options(): only then does Ray end a worker that initialised CUDA on its GPU.
        remote = ray.remote(max_retries=3, **trial_options(task))(run_trial)
        reference = remote.remote(task, queue.put)
        done: list[Any] = []
        while not done:
            done, _ = ray.wait([reference], timeout=0.5)
            for row in queue.get_nowait_batch(queue.qsize()):
                facts = f"{row['monitor']} {row['value']:.4f}" if row.get("value") is not None else ""
                progress.advance(max(0, row["step"] - progress.done), facts=facts)
    result = ray.get(reference)
    queue.shutdown(grace_period_s=1)
    say(f"{STAGE}: best {task.classifier.monitor} {result['value']:.4f} at step {result['best_step']:,}; "
        f"{task.artifact.path}")  # fmt: skip
    return task.artifact


def trial_options(task: ClassifierTask) -> dict[str, Any]:
    """Ray resources of the process that runs a trial; a nested trainer's workers hold their own."""
    if (task.compute.classifier_workers or 1) > 1:
        return {"num_cpus": 0}
    return {"num_cpus": task.compute.trial_cpus} | ({"num_gpus": task.compute.trial_gpus} if task.gpu else {})
