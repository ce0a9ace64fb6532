"""Measures how close the synthetic images are to held-out real ones, beside a real-against-real floor at the same n.

Input: an ingest and a generate artifact. Output, under `fidelity/<name>-<fp>/`: `fidelity.parquet` and `fidelity.csv`
(see raysynth.metrics.fidelity). Three samples of n images each are compared: real test images, real train images, which
have the test images' distribution and none of their patients, and synthetic images. Nothing is chosen by the result.

Features are extracted by Ray tasks of `PIECE` images, whatever the cluster has: each returns moments, and features of
the first images only, so that neither pixels nor many features pass through the driver.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import ConfigError, DataError, RaysynthError
from raysynth.core.experiment import Experiment
from raysynth.core.progress import Progress, say
from raysynth.core.schemas import LABEL, from_parquet, label_names, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.strata import seeded_order, stratified_order, used_labels
from raysynth.data.views import INDEX
from raysynth.metrics.distances import Moments
from raysynth.metrics.features import blind_spot, extractor_identity, make_extractor
from raysynth.metrics.fidelity import ALL, KEPT, Sample, Settings, compare, fidelity_schema, metric_name
from raysynth.stages.cluster import Resources
from raysynth.stages.generated import synthetic_set_of
from raysynth.stages.views import build_synthetic_view, build_view, open_view_folder

STAGE = "fidelity"
STAGE_VERSION = 1
TABLE = "fidelity.parquet"
PIECE = 2000
"""Images of one task. Fixed, so that sums are rounded alike on every cluster."""
BATCH = 50


def fidelity_artifact(experiment: Experiment, storage: Storage, images: Artifact, generated: Artifact) -> Artifact:
    """The stage's artifact for these images, whether or not it exists yet.

    Args:
        images: a complete ingest artifact.
        generated: a complete generate artifact.
    """
    v = experiment.evaluation
    config = {
        **extractor_identity(v.fidelity.extractor), "images": v.fidelity.images, "classes": v.fidelity.classes,
        "policy": {name: use for name, use in experiment.data.labels.policy.items() if use != "ignore"},
        "min_positives": v.min_positives, "bootstraps": v.bootstraps, "confidence": v.confidence, "seed": v.seed,
    }  # fmt: skip
    inputs = {"images": images.digest(), "generated": generated.digest()}
    return Artifact.at(storage, STAGE, experiment.name, STAGE_VERSION, config, inputs)


def fidelity(
    experiment: Experiment, storage: Storage, images: Artifact, generated: Artifact, resources: Resources
) -> Artifact:
    """Measures and writes the table; returned at once where it exists. Ray must be connected.

    Raises:
        ConfigError: the extractor cannot be used.
        DataError: fewer than two images of a side.
        EnvironmentFault: the extractor's weights cannot be had here.
    """
    kind = experiment.evaluation.fidelity.extractor
    if kind == "none":
        raise ConfigError("evaluation.fidelity.extractor", kind, "an extractor where fidelity is asked for")
    artifact = fidelity_artifact(experiment, storage, images, generated)
    if artifact.complete:
        return artifact
    size = experiment.data.image.size
    table = from_parquet(storage.get(images.file("table.parquet")))
    synthetic_view = build_synthetic_view(experiment, storage, generated, size)
    labels = [LABEL + name for name in label_names(table.schema)]
    synthetic = from_parquet(storage.get(synthetic_view.file(INDEX)), ["image_id", "source_image_id", *labels])
    sides = [table.filter(pc.equal(table["split"], "test")), table.filter(pc.equal(table["split"], "train")), synthetic]
    n = min(experiment.evaluation.fidelity.images or sides[0].num_rows, *(s.num_rows for s in sides))
    if n < 2:
        counts = ", ".join(f"{s.num_rows} {name}" for s, name in zip(sides, ("test", "train", "synthetic")))
        raise DataError("evaluation.fidelity", counts, "at least two images of each", "Or set its extractor to none.")
    policy = experiment.data.labels.policy
    chosen = [_chosen(side, n, policy) for side in sides]
    views = [build_view(experiment, storage, images, size, c["image_id"].to_pylist()).path for c in chosen[:2]]
    views.append(synthetic_view.path)
    artifact.started = time.time()  # views have their own seconds
    found, extractor, weights, gpu_seconds = _extract(experiment, storage, resources, views, chosen)
    samples = [
        Sample(moments, features, used_labels(c, policy)[: len(features)], _units(c, table)[: len(features)])
        for (moments, features), c in zip(found, chosen)
    ]  # fmt: skip
    v = experiment.evaluation
    names = label_names(table.schema) if v.fidelity.classes else []
    note = blind_spot(v.fidelity.extractor, size)
    settings = Settings(names, v.min_positives, v.bootstraps, v.confidence, v.seed, note)
    rows = compare(samples[0], samples[1], samples[2], settings)
    store = synthetic_set_of(generated)
    of = {"generator_id": store.identity["generator_id"], "synthetic_set": f"{store.name}-{store.fp}",
          "extractor": extractor}  # fmt: skip
    result = pa.Table.from_pylist([{**of, **row} for row in rows], schema=fidelity_schema())
    artifact.put(TABLE, to_parquet(result))
    artifact.put("fidelity.csv", result.to_pandas().to_csv(index=False, lineterminator="\n").encode())
    artifact.commit({"images": n}, gpu_seconds=gpu_seconds, extractor=extractor, weights_sha256=weights, views=views)
    for row in rows:
        if row["class"] == ALL:
            say(_line(row, extractor))
    return artifact


def _chosen(side: pa.Table, n: int, policy: dict[str, str]) -> pa.Table:
    """n rows in an order whose every prefix keeps the shares of the labels."""
    order = seeded_order("fidelity", 0, side["image_id"].to_pylist())
    return side.take(stratified_order(side, order, policy)[:n])


def _units(rows: pa.Table, real: pa.Table) -> list[str]:
    """The patient of every image; of a synthetic one, the patient of its source image, where it has one."""
    patient = dict(zip(real["image_id"].to_pylist(), real["patient_id"].to_pylist()))
    sources = rows["source_image_id" if "source_image_id" in rows.column_names else "image_id"].to_pylist()
    return [patient.get(s) or s or i for s, i in zip(sources, rows["image_id"].to_pylist())]


def _extract(
    experiment: Experiment, storage: Storage, resources: Resources, views: Sequence[str], chosen: Sequence[pa.Table]
) -> tuple[list[tuple[Moments, np.ndarray]], str, str, float]:
    """Moments of all and features of the first `KEPT` images of every view; name and weights of the extractor; seconds
    for which tasks held a GPU."""
    import ray

    kind, cache = experiment.evaluation.fidelity.extractor, experiment.compute.cache
    gpu = bool(resources.gpus) and kind != "pixels"
    task = ray.remote(num_cpus=1, num_gpus=int(gpu))(extract_piece)
    pieces = []
    for side, (view, rows) in enumerate(zip(views, chosen)):
        for start in range(0, rows.num_rows, PIECE):
            ids = rows["image_id"].slice(start, PIECE)
            kept = max(0, KEPT - start)
            pieces.append((side, task.remote(storage, view, ids, kind, cache, "cuda" if gpu else "cpu", kept)))
    moments: list[Moments | None] = [None] * len(views)
    features: list[list[np.ndarray]] = [[] for _ in views]
    name, weights, gpu_seconds = "", "", 0.0
    with Progress(STAGE, sum(c.num_rows for c in chosen), "images") as progress:
        for side, piece in pieces:
            try:
                part, kept_features, name, weights, seconds = ray.get(piece)
            except ray.exceptions.RayTaskError as error:
                # What went wrong in words, without a worker's traceback around it.
                raise error.cause if isinstance(error.cause, RaysynthError) else error from None
            before = moments[side]
            moments[side] = part if before is None else before.merge(part)
            features[side].append(kept_features)
            gpu_seconds += seconds if gpu else 0.0
            progress.advance(part.n)
    found = [(m, np.concatenate(f)) for m, f in zip(moments, features) if m is not None]
    return found, name, weights, gpu_seconds


_extractor = lru_cache(maxsize=1)(make_extractor)


def extract_piece(
    storage: Storage, view: str, ids: pa.ChunkedArray, kind: str, cache: str, device: str, kept: int
) -> tuple[Moments, np.ndarray, str, str, float]:
    """Features of some images of a view: their moments, the first `kept` of them, name and weights of the extractor,
    and the seconds it took.

    Runs in a Ray task; a process loads the extractor once.
    """
    began = time.monotonic()
    extractor = _extractor(kind, cache, device)
    opened = open_view_folder(storage, view, cache)
    positions = opened.positions(ids)
    features = np.concatenate([
        extractor(opened.images(positions[start : start + BATCH])) for start in range(0, len(positions), BATCH)
    ])  # fmt: skip
    seconds = time.monotonic() - began
    return Moments.of(features), features[:kept], extractor.name, extractor.weights, seconds


def _line(row: dict[str, Any], extractor: str) -> str:
    interval = "" if row["ci_low"] is None else f" ({row['ci_low']:.4g} to {row['ci_high']:.4g})"
    value, floor = ("withheld" if row[k] is None else f"{row[k]:.4g}" for k in ("value", "floor"))
    name = metric_name(row["metric"], extractor)
    return f"{STAGE}: {name} {value}{interval}; real against real {floor}; n = {row['n_synth']:,}"
