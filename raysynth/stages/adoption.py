"""A generator that was trained before or elsewhere (`generator.path`), used as it is.

Input: a train-generator artifact of any root, or its exported folder, local or s3://. Output: a train-generator
artifact of this root: the one that `path` names, or a copy of its export under the digest of what lies there. What it
is, for the identity of synthetic sets, is the digest of its weights, wherever they lie. What it saw is read from its
`seen.parquet`, and how many images from its `generator.json`; where it has neither, nobody knows and reports say so.
Starts no Ray and loads no weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import ConfigError, DataError, EnvironmentFault
from raysynth.core.experiment import Experiment
from raysynth.core.presets import resolve_generator, resolve_image
from raysynth.core.progress import say
from raysynth.core.schemas import ATTRIBUTE, LABEL, from_parquet, label_names
from raysynth.core.storage import Storage, open_storage
from raysynth.data.conditions import AGE, ConditionSpec
from raysynth.data.found import digest
from raysynth.data.plans import plan_sources
from raysynth.data.subsets import generator_rows, real_subset

STAGE = "train-generator"
ADOPTION_VERSION = 1
SEEN = "seen.parquet"
NEEDED = ("condition.json", "scheduler/scheduler_config.json", "unet/config.json",
          "unet/diffusion_pytorch_model.safetensors")  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """The real images that a generator was trained on."""

    count: int | None
    """How many in all; None where it does not say."""
    ids: frozenset[str] | None
    """Those that are images of this experiment, by id; None where they are not known."""
    train_on: str | None
    """Its own `generator.train_on`."""


def given_artifact(experiment: Experiment, storage: Storage) -> Artifact:
    """The artifact of the generator at `generator.path`, whether or not it has been copied yet.

    Raises:
        DataError: there is no exported generator.
    """
    inside = _inside(experiment, storage)
    if inside and storage.exists(f"{inside}/_SUCCESS"):
        return Artifact.open(storage, inside)
    there, folder, _ = _found(experiment)
    entries = there.list(folder)
    inputs = {"generator": digest([_relative(e, folder) for e in entries])}
    return Artifact.at(storage, STAGE, experiment.name, ADOPTION_VERSION, {"given": True}, inputs)


def seen_by_given(experiment: Experiment, storage: Storage) -> pa.Table | None:
    """What the generator at `generator.path` was trained on, copied yet or not, as `seen_table`; None where it does not
    say, or is not there yet."""
    inside = _inside(experiment, storage)
    around = storage if inside else open_storage(experiment.generator.path.rstrip("/").removesuffix("/export"))
    path = f"{inside}/{SEEN}".lstrip("/")
    return from_parquet(around.get(path)) if around.exists(path) else None


def _inside(experiment: Experiment, storage: Storage) -> str:
    """The folder of `generator.path` among this root's generators; empty where it lies elsewhere."""
    path = experiment.generator.path.rstrip("/").removesuffix("/export")
    if path.startswith(f"{STAGE}/"):
        return path
    full = path if path.startswith("s3://") else os.path.abspath(os.path.expanduser(path))
    return full.removeprefix(f"{storage.root}/") if full.startswith(f"{storage.root}/{STAGE}/") else ""


def _relative(entry: Any, folder: str) -> Any:
    from dataclasses import replace

    return replace(entry, path=entry.path.removeprefix(f"{folder}/")) if folder else entry


def _found(experiment: Experiment) -> tuple[Storage, str, dict[str, Any]]:
    """Storage and folder of the export, and the `run.json` of the artifact around it, empty where there is none."""
    path = experiment.generator.path.rstrip("/")
    root, folder = open_storage(path), ""
    if root.exists("export/condition.json"):
        folder = "export"
    missing = [n for n in NEEDED if not root.exists(f"{folder}/{n}".lstrip("/"))]
    if missing:
        raise DataError(
            "generator.path", path, f"a train-generator artifact, or the folder it exports ({', '.join(NEEDED)})",
            f"There is no {missing[0]}.",
        )  # fmt: skip
    around = root if folder else open_storage(path.removesuffix("/export"))
    owner = folder or path.endswith("/export")
    run = json.loads(around.get("run.json")) if owner and around.exists("run.json") else {}
    return root, folder, run


def adopt(experiment: Experiment, storage: Storage) -> Artifact:
    """Copies the generator to this root, unless it is there.

    Raises:
        DataError: there is no exported generator.
    """
    artifact = given_artifact(experiment, storage)
    path = experiment.generator.path
    if artifact.complete:
        say(f"{STAGE}: nothing to train; generator.path is {artifact.path}")
        return artifact
    there, folder, run = _found(experiment)
    size = 0
    for entry in there.list(folder):
        data = there.get(entry.path)
        artifact.put(f"export/{_relative(entry, folder).path}", data)
        size += len(data)
    around = there if folder else open_storage(path.rstrip("/").removesuffix("/export"))
    if run and around.exists(SEEN):
        artifact.put(SEEN, around.get(SEEN))
    facts = _facts(artifact)
    artifact.commit(
        {"n_real_generator": facts.get("n_real_generator"), "steps": facts.get("steps")},
        taken_from=path, weights_sha256=facts.get("weights_sha256"),
        licences=[facts["licence"]] if facts.get("licence") else [], train_seconds=run.get("train_seconds"),
    )  # fmt: skip
    say(f"{STAGE}: nothing to train; {path} ({size / 2**20:,.1f} MiB) was copied to {artifact.path}")
    return artifact


def _facts(generator: Artifact) -> dict[str, Any]:
    try:
        return json.loads(generator.storage.get(generator.file("export/generator.json")))
    except FileNotFoundError:
        return {}


def seen_by_generator(experiment: Experiment, storage: Storage, table: pa.Table) -> Seen:
    """What the experiment's generator was trained on.

    Args:
        table: the ingest artifact's.
    """
    g = experiment.generator
    if g.kind == "external":
        return Seen(None, None, None)
    if not g.path:
        ids = frozenset(generator_rows(table, experiment))
        return Seen(len(ids), ids, g.train_on)
    return seen_by(given_artifact(experiment, storage), table)


def seen_by(generator: Artifact, table: pa.Table) -> Seen:
    """As `seen_by_generator`, of a generator that is complete."""
    facts = _facts(generator)
    seen = _seen_table(generator)
    ids = None if seen is None else frozenset(table.filter(_known(seen, table))["image_id"].to_pylist())
    return Seen(facts.get("n_real_generator"), ids, facts.get("train_on"))


def seen_table(rows: pa.Table) -> pa.Table:
    """What `seen.parquet` holds of the training images `rows` of an image table."""
    return rows.select([n for n in ("dataset", "image_id", "patient_id", "pixel_sha256") if n in rows.column_names])


def _seen_table(generator: Artifact) -> pa.Table | None:
    try:
        return from_parquet(generator.storage.get(generator.file(SEEN)))
    except FileNotFoundError:
        return None


def _known(seen: pa.Table, table: pa.Table) -> pa.Array:
    """(N,) bool: the image, by id or by its pixels, is among those seen."""
    found = _same(seen, table, ("dataset", "image_id"))
    return pc.or_(found, _same(seen, table, ("pixel_sha256",)))


def _same(seen: pa.Table, table: pa.Table, columns: Sequence[str]) -> pa.Array:
    if not set(columns) <= set(seen.column_names) & set(table.column_names):
        return pa.array([False] * table.num_rows)
    there = set(zip(*(seen[c].to_pylist() for c in columns)))
    rows = zip(*(table[c].to_pylist() for c in columns))
    return pa.array([None not in row and row in there for row in rows], pa.bool_())


def check_given(experiment: Experiment, storage: Storage, images: Artifact, generator: Artifact) -> None:
    """Whether this generator can render what the experiment asks for, from files of a few kilobytes.

    Raises:
        ConfigError: it makes other images, or is told other things, than the experiment says.
        DataError: it has not learned a class or category of the plan's sources; it was trained on a validation or test
            image, or on one of their patients.
        EnvironmentFault: it is not copied yet.
    """
    if not generator.complete:
        raise EnvironmentFault(f"{generator.path} is not there yet. Run `raysynth train-generator`, which copies it.")
    e = experiment
    spec = ConditionSpec.from_json(storage.get(generator.file("export/condition.json")))
    _check_images(e, json.loads(storage.get(generator.file("export/unet/config.json"))))
    scheduler = json.loads(storage.get(generator.file("export/scheduler/scheduler_config.json")))
    timesteps = scheduler["num_train_timesteps"]
    if e.sampling.steps > timesteps:
        raise ConfigError("sampling.steps", e.sampling.steps, f"1 to {timesteps}, those of generator.path")
    told = {*(["label"] if spec.classes else []), *spec.attributes, *([AGE] if spec.age else [])}
    if told != set(e.generator.conditions):
        raise ConfigError(
            "generator.conditions", e.generator.conditions,
            f"{sorted(told)}, what the generator of generator.path is told", "Write them, or train another generator.",
        )  # fmt: skip
    if spec.kind != e.data.labels.kind:
        raise ConfigError("data.labels.kind", e.data.labels.kind, f"{spec.kind}, as for generator.path")
    table = from_parquet(storage.get(images.file("table.parquet")))
    _check_labels(spec, plan_sources(table, e))
    _check_held_out(e, generator, table)


def say_seen(experiment: Experiment, storage: Storage, images: Artifact, generator: Artifact) -> None:
    """Says what the generator was trained on, and how much of it this experiment's classifier is not."""
    table = from_parquet(storage.get(images.file("table.parquet")))
    seen = seen_by(generator, table)
    if seen.count is None:
        return  # `check_given` has said that nobody knows
    words = f"{STAGE}: it was trained on {seen.count:,} real images" + (f" ({seen.train_on})" if seen.train_on else "")
    if seen.ids is not None:
        own = real_subset(table, experiment.training_set, experiment.data.labels.policy)
        words += f"; {seen.count - len(seen.ids.intersection(own)):,} of them are not the classifier's"
    say(words)


def _check_images(e: Experiment, unet: dict[str, Any]) -> None:
    size = resolve_generator(e.generator, resolve_image(e.data.image)).size
    if unet["sample_size"] != size:
        raise ConfigError(
            "generator.size", size, f"{unet['sample_size']}, the side of what generator.path makes",
            f"Write generator.size: {unet['sample_size']}.",
        )  # fmt: skip
    channels = resolve_image(e.data.image).channels
    if unet["in_channels"] != (1 if channels == "grey" else 3):
        made = {1: "grey", 3: "rgb"}.get(unet["in_channels"], f"{unet['in_channels']} channels")
        raise ConfigError("data.image.channels", channels, f"{made}, as generator.path makes")


def _check_labels(spec: ConditionSpec, sources: pa.Table) -> None:
    columns = {n: sources[n].to_pylist() for n in sources.column_names if n.startswith((LABEL, ATTRIBUTE))}
    for name in label_names(sources.schema) if spec.classes else []:
        # A class that it has no entry for would be rendered as "label missing".
        if name not in spec.classes and pc.any(pc.equal(sources[LABEL + name], 1)).as_py():
            raise DataError(
                "generator.path", name, f"a generator that knows every class of the plan; it knows {spec.classes}",
                "A new class needs a generator that has seen it: leave generator.path out to train one, or leave the "
                "class out of data.labels.classes.",
            )  # fmt: skip
    spec.encode(columns)


def _check_held_out(e: Experiment, generator: Artifact, table: pa.Table) -> None:
    seen = _seen_table(generator)
    if seen is None:
        say(f"note: which real images {e.generator.path} was trained on is not known; it must be none of this "
            "experiment's validation and test images, nor of their patients")  # fmt: skip
        return
    held_out = table.filter(pc.not_equal(table["split"], "train"))
    leaked = pc.or_(_known(seen, held_out), _same(seen, held_out, ("dataset", "patient_id")))
    found = held_out.filter(leaked)["image_id"].to_pylist()
    if found:
        raise DataError(
            "generator.path", f"a generator trained on {len(found)} images (or their patients) that are now validation "
            f"or test images, such as {found[0]}", "one that saw none of them",
            "Keep the splits it was trained under: data.split.keep: <the ingest artifact of that time>.",
        )  # fmt: skip
