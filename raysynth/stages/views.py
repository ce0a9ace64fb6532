"""Builds training views: Ray Data decodes and resizes the wanted images once (see raysynth.data.views).

One Ray Data row is one part file of the images; its task writes one chunk to storage and returns a line of facts, so
pixels never pass through the driver. The index is ordered by a hash of the image id, whatever the parts are.

Input: an ingest artifact and image ids, or a generate artifact. Output: a `view` artifact: `chunks/*.npy`,
`index.parquet` (image_id, split, chunk, row, labels and attributes; real ones also patient_id and site, synthetic ones,
whose image_id is the row key, source_image_id).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysynth.core.artifacts import Artifact
from raysynth.core.cache import local_folder
from raysynth.core.errors import DataError
from raysynth.core.experiment import Experiment
from raysynth.core.identity import content_digest, sha256_bytes
from raysynth.core.presets import resolve_image
from raysynth.core.progress import Progress
from raysynth.core.schemas import ATTRIBUTE, LABEL, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.images import decode_png, to_size
from raysynth.data.views import CHUNKS, INDEX, View, npy_bytes
from raysynth.stages.generated import load_index, synthetic_set_of

STAGE = "view"
STAGE_VERSION = 2


def build_view(
    experiment: Experiment, storage: Storage, images: Artifact, size: int, ids: Sequence[str]
) -> Artifact:
    """The view of `ids` at `size` pixels; returned at once where it exists.

    Args:
        images: a complete ingest artifact.
        size: side of the square images, pixels.
        ids: image ids; their order does not matter.

    Raises:
        DataError: an id that is not among the images.
    """
    spec = resolve_image(experiment.data.image)
    digest = content_digest((i, "") for i in ids)
    config = {"size": size, "channels": spec.channels, "fit": spec.fit, "ids": digest}
    view = Artifact.at(storage, STAGE, experiment.name, STAGE_VERSION, config, {"images": images.digest()})
    if view.complete:
        return view
    parts = sorted(e.path for e in storage.list(images.file("images")) if e.path.endswith(".parquet"))
    index, work = _index(storage, parts, set(ids), view, size, str(spec.fit))
    if index.num_rows != len(set(ids)):
        absent = sorted(set(ids) - set(index["image_id"].to_pylist()))
        raise DataError("image_id", absent[0], f"among the images of {storage.url(images.path)}")
    _decode(storage, view, work, index.num_rows)
    view.put(INDEX, to_parquet(index))
    view.commit({"images": index.num_rows, "chunks": len(work)})
    return view


def build_synthetic_view(experiment: Experiment, storage: Storage, generated: Artifact, size: int) -> Artifact:
    """The view of every image that `generated` lists as ok, at `size` pixels; returned at once where it exists.

    Args:
        generated: a complete generate artifact; its experiment's `name` need not be this one's.
    """
    spec = resolve_image(experiment.data.image)
    config = {"size": size, "channels": spec.channels, "fit": spec.fit, "source": "synthetic"}
    view = Artifact.at(storage, STAGE, experiment.name, STAGE_VERSION, config, {"images": generated.digest()})
    if view.complete:
        return view
    rows = load_index(generated)
    rows = rows[rows["status"] == "ok"]
    store = synthetic_set_of(generated)
    tables, work = [], []
    for number, (part, mine) in enumerate(rows.groupby("part", sort=True)):
        path, places = store.file(str(part)), sorted(mine["place"])
        with storage.open(path) as f:
            names = pq.read_schema(f).names
        kept = ["row_key", "source_image_id", "split", *(n for n in names if n.startswith((LABEL, ATTRIBUTE)))]
        with storage.open(path) as f:
            table = pq.read_table(f, columns=kept).take(pa.array(places))
        tables.append(_placed(table.rename_columns({"row_key": "image_id"}), view, path, places, size, number, work,
                              str(spec.fit)))  # fmt: skip
    index = _hash_order(pa.concat_tables(tables))
    _decode(storage, view, work, index.num_rows)
    view.put(INDEX, to_parquet(index))
    view.commit({"images": index.num_rows, "chunks": len(work)})
    return view


def open_view(view: Artifact, cache: str) -> View:
    """Maps a view from local disk, copying it into `cache` first where the root is remote."""
    return View(local_folder(view.storage, view.path, cache))


def open_view_folder(storage: Storage, folder: str, cache: str) -> View:
    """As `open_view`, from the view's path; for workers."""
    return View(local_folder(storage, folder, cache))


def _index(
    storage: Storage, parts: list[str], ids: set[str], view: Artifact, size: int, fit: str
) -> tuple[pa.Table, list[dict[str, Any]]]:
    tables, work = [], []
    for number, part in enumerate(parts):
        with storage.open(part) as f:
            names = pq.read_schema(f).names
        kept = ["image_id", "patient_id", "site", "split", *(n for n in names if n.startswith((LABEL, ATTRIBUTE)))]
        with storage.open(part) as f:
            table = pq.read_table(f, columns=kept)
        rows = [i for i, name in enumerate(table["image_id"].to_pylist()) if name in ids]
        if not rows:
            continue
        tables.append(_placed(table.take(rows), view, part, rows, size, number, work, fit))
    if not tables:
        return pa.table({"image_id": pa.array([], pa.string())}), []
    return _hash_order(pa.concat_tables(tables)), work


def _placed(
    table: pa.Table, view: Artifact, part: str, rows: list[int], size: int, number: int, work: list[dict[str, Any]],
    fit: str,
) -> pa.Table:  # fmt: skip
    """`table` with the chunk and row its images will have; adds the chunk to `work`."""
    chunk = f"{number:05d}.npy"
    work.append({"part": part, "rows": rows, "chunk": view.file(f"{CHUNKS}/{chunk}"), "size": size, "fit": fit})
    table = table.append_column("chunk", pa.array([chunk] * len(rows)))
    return table.append_column("row", pa.array(range(len(rows)), pa.int64()))


def _hash_order(table: pa.Table) -> pa.Table:
    keys = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in table["image_id"].to_pylist()]
    return table.take(sorted(range(len(keys)), key=keys.__getitem__))


def _decode(storage: Storage, view: Artifact, work: list[dict[str, Any]], total: int) -> None:
    import ray.data

    from raysynth.stages.cluster import quiet_data_context

    quiet_data_context()
    # One row a block: a small list would otherwise become one task.
    rows = ray.data.from_items(work, override_num_blocks=len(work)).map(
        write_chunk, fn_kwargs={"storage": storage}, num_cpus=1
    )
    with Progress(STAGE, total, "images") as progress:
        for row in rows.iter_rows():
            view.register(f"{CHUNKS}/{Path(row['chunk']).name}", row["sha256"])
            progress.advance(int(row["images"]))


def write_chunk(row: dict[str, Any], storage: Storage) -> dict[str, Any]:
    """Decodes and resizes the wanted rows of one part file and writes them as one chunk; runs in a Ray Data task."""
    with storage.open(row["part"]) as f:
        cells = pq.read_table(f, columns=["image"])["image"].take(pa.array(row["rows"])).to_pylist()
    images = [to_size(decode_png(cell["bytes"]), int(row["size"]), row["fit"]) for cell in cells]
    data = npy_bytes(np.stack(images))
    storage.put(row["chunk"], data)
    return {"chunk": row["chunk"], "sha256": sha256_bytes(data), "images": len(images)}
