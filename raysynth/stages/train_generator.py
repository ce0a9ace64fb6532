"""Trains the pixel-space DDPM on Ray Train and exports it as a diffusers folder.

Input: an ingest artifact. Output, under `train-generator/<name>-<fp>/`: `export/` (the generator, see
raysynth.models.export), `seen.parquet` (which images it was trained on), `samples/*.png`, `log/` (loss.jsonl and
TensorBoard). While it trains, `checkpoints/` holds what a killed run goes on from. Which images the generator may see
is `generator.train_on`'s to say; nothing of a validation or test patient ever reaches it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import ConfigError, DataError, EnvironmentFault
from raysynth.core.experiment import Compute, Experiment, Generator
from raysynth.core.identity import content_digest
from raysynth.core.presets import resolve_generator, resolve_image
from raysynth.core.progress import say
from raysynth.core.schemas import ATTRIBUTE, LABEL, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.conditions import ConditionSpec
from raysynth.data.labels import check_policy
from raysynth.data.plans import plan_sources
from raysynth.data.subsets import generator_rows
from raysynth.stages import training_loop
from raysynth.stages.adoption import SEEN, seen_table
from raysynth.stages.cluster import slots
from raysynth.stages.ingest import load_table, load_vocabulary
from raysynth.stages.trainer import fit
from raysynth.stages.training_log import TrainingLog
from raysynth.stages.views import build_view

STAGE = "train-generator"
STAGE_VERSION = 2


def generator_artifact(experiment: Experiment, storage: Storage, images: Artifact) -> Artifact:
    """The stage's artifact for this experiment, whether or not it exists yet.

    Args:
        images: a complete ingest artifact.
    """
    generator = dataclasses.asdict(_resolved(experiment))
    # A preset is a word for its values: typed out, they are the same generator.
    for name in ("preset", "path", "images", "columns", "on_held_out"):
        del generator[name]
    policy = {name: use for name, use in experiment.data.labels.policy.items() if use != "ignore"}
    config: dict[str, Any] = {"generator": generator, "policy": policy}
    if experiment.generator.train_on != "train":
        config["training_set"] = experiment.training_set.subset
    return Artifact.at(storage, STAGE, experiment.name, STAGE_VERSION, config, {"images": images.digest()})


def train_generator(experiment: Experiment, storage: Storage, images: Artifact) -> Artifact:
    """Trains and exports the generator; returned at once where it exists, continued where it was interrupted.

    Ray must be connected (`stages.cluster.connect`).

    Raises:
        ConfigError: the batch cannot be shared among the workers; the loss diverged.
        DataError: an image of a validation or test patient was selected; the plan would ask for a class or category
            of which the generator sees no image.
        EnvironmentFault: the cluster has no room for the workers; they died more often than they are restarted.
    """
    artifact = generator_artifact(experiment, storage, images)
    if artifact.complete:
        return artifact
    generator = _resolved(experiment)
    vocabulary = load_vocabulary(storage, images)
    rows, spec = learned(experiment, load_table(storage, images), vocabulary)
    ids = sorted(rows["image_id"].to_pylist())
    workers, gpu = _workers(generator, experiment.compute)
    view = build_view(experiment, storage, images, generator.size or 0, ids)
    if not storage.exists(artifact.file("export.json")):
        channels = 1 if resolve_image(experiment.data.image).channels == "grey" else 3
        facts = {
            "n_real_generator": len(ids), "train_on": generator.train_on, "images_digest": images.digest(),
            "ids_digest": content_digest((i, "") for i in ids), "channels": channels,
            "licence": experiment.data.licence, "dataset": experiment.data.dataset or experiment.name,
        }  # fmt: skip
        say(f"{STAGE}: {len(ids):,} real images ({generator.train_on}: {per_class(rows, vocabulary['classes'])}), "
            f"{generator.steps:,} steps of {generator.batch_size}, {max(1, workers)} "
            f"{'GPU' if gpu else 'CPU'} process(es)")  # fmt: skip
        every = experiment.compute.checkpoint_every
        with TrainingLog(storage, artifact.file("log"), STAGE, generator.steps, every) as log:
            task = training_loop.Task(
                storage, artifact.path, view.path, generator, spec, list(vocabulary["classes"]), facts,
                experiment.compute, log.queue,
            )  # fmt: skip
            _fit(task, artifact, workers, gpu)
    _commit(artifact, storage, experiment, rows, workers if gpu else 0, view)
    return artifact


def learned(experiment: Experiment, table: pa.Table, vocabulary: dict[str, Any]) -> tuple[pa.Table, ConditionSpec]:
    """The rows of ingest's table that the generator is trained on, and how it is told what they show.

    Raises:
        DataError: as `train_generator`.
    """
    labels = experiment.data.labels
    check_policy(labels, vocabulary["classes"])
    rows = training_rows(table, generator_rows(table, experiment))
    spec = ConditionSpec.build(vocabulary, experiment.generator.conditions, _columns(rows), labels.policy)
    # Refuses now what rendering would refuse row by row, after hours of training.
    spec.encode(_columns(plan_sources(table, experiment)))
    return rows, spec


def training_rows(table: pa.Table, ids: Sequence[str]) -> pa.Table:
    """The rows of `ids`, after a second look that no validation or test image, nor its patient, is among them.

    Raises:
        DataError: one is, or an id is not in the table.
    """
    rows = table.filter(pc.is_in(table["image_id"], value_set=pa.array(ids, pa.string())))
    if rows.num_rows != len(set(ids)):
        raise DataError("image_id", sorted(set(ids) - set(rows["image_id"].to_pylist()))[:1], "in the image table")
    held_out = table.filter(pc.not_equal(table["split"], "train"))["patient_id"].unique()
    wrong = rows.filter(pc.or_(pc.not_equal(rows["split"], "train"), pc.is_in(rows["patient_id"], held_out)))
    if wrong.num_rows:
        first = wrong.slice(0, 1).to_pylist()[0]
        raise DataError(
            "generator.train_on", f"{first['image_id']} of patient {first['patient_id']}",
            "an image of a patient of the train split only",
            "The generator must not see validation or test patients.",
        )  # fmt: skip
    return rows


def _resolved(experiment: Experiment) -> Generator:
    return resolve_generator(experiment.generator, resolve_image(experiment.data.image))


def _columns(rows: pa.Table) -> dict[str, list[Any]]:
    return {n: rows[n].to_pylist() for n in rows.column_names if n.startswith((LABEL, ATTRIBUTE))}


def per_class(rows: pa.Table, classes: Sequence[str]) -> str:
    """How many images are positive for each class or finding, for people."""
    counts = {c: pc.sum(pc.equal(rows[LABEL + c], 1)).as_py() or 0 for c in classes}
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _workers(generator: Generator, compute: Compute) -> tuple[int, bool]:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    on_gpu = compute.use_gpu is not False and any(node.get("GPU", 0) >= 1 for node in nodes)
    one = _resources(compute, on_gpu)
    room = slots(nodes, one)
    workers = compute.train_workers
    if workers is None:
        workers = sharing_workers(generator.batch_size // compute.train_accumulation, room if on_gpu else 1)
    pieces = max(1, workers) * compute.train_accumulation
    if generator.batch_size % pieces:
        raise ConfigError(
            "generator.batch_size", generator.batch_size,
            f"divisible by training processes x accumulation ({pieces})",
            "Set compute.train_workers to a divisor, or change the batch knowingly.",
        )  # fmt: skip
    if workers > room:
        each = " and ".join(f"{n:g} {kind}" for kind, n in one.items())
        raise EnvironmentFault(
            f"compute.train_workers: got {workers}, must be at most {room}: that many processes of {each} each fit "
            f"the cluster's {len(nodes)} node(s). Lower it or compute.train_threads, or add nodes."
        )
    return workers, on_gpu and workers > 0


def _resources(compute: Compute, gpu: bool) -> dict[str, float]:
    """What one training process takes."""
    return {"CPU": compute.train_threads or 1} | ({"GPU": 1} if gpu else {})


def sharing_workers(batch: int, room: int) -> int:
    """The most processes, at most `room`, that share a batch equally; at least one."""
    return max((n for n in range(1, min(batch, room) + 1) if batch % n == 0), default=1)


def _fit(task: training_loop.Task, artifact: Artifact, workers: int, gpu: bool) -> None:
    config = {"task": task, "gpu": gpu}
    returned = fit(STAGE, training_loop.train, config, artifact, workers, _resources(task.compute, gpu), gpu) or {}
    if returned.get("fault"):
        raise EnvironmentFault(f"{STAGE}: {returned['fault']}")
    diverged = returned.get("diverged")
    if diverged is not None:
        raise ConfigError(
            "generator.lr", task.generator.lr, f"lower: the loss was not finite at step {diverged}",
            "Try a third of it, more generator.warmup_steps, or precision: bf16 instead of fp16.",
        )  # fmt: skip


def _commit(
    artifact: Artifact, storage: Storage, experiment: Experiment, rows: pa.Table, gpus: int, view: Artifact
) -> None:
    """Ends the artifact.

    Args:
        gpus: that the training processes hold.
        view: what they read.
    """
    files: dict[str, str] = json.loads(storage.get(artifact.file("export.json")))
    for name, sha256 in files.items():
        artifact.register(f"export/{name}", sha256)
    facts = json.loads(storage.get(artifact.file("export/generator.json")))
    artifact.put(SEEN, to_parquet(seen_table(rows)))
    seconds = _trained_seconds(artifact, storage)
    artifact.commit(
        {"n_real_generator": rows.num_rows, "steps": experiment.generator.steps},
        gpu_seconds=(seconds or 0.0) * gpus,
        weights_sha256=facts["weights_sha256"],
        licences=[experiment.data.licence],
        compute=dataclasses.asdict(experiment.compute),
        train_seconds=seconds,
        views=[view.path],
    )
    for entry in storage.list(artifact.file("checkpoints")):
        storage.delete(entry.path)


def _trained_seconds(artifact: Artifact, storage: Storage) -> float | None:
    log = artifact.file("log/loss.jsonl")
    if not storage.exists(log):
        return None
    rows = [json.loads(line) for line in storage.get(log).decode().splitlines()]
    steps = [b["step"] - a["step"] for a, b in zip([{"step": 0}, *rows], rows, strict=False)]
    return round(sum(n / r["steps_per_s"] for n, r in zip(steps, rows, strict=True) if r["steps_per_s"]), 1)
