"""Builds training views: Ray Data decodes and resizes the wanted images once (see raysynth.data.views).

One Ray Data row is one part file of the images; its task writes one chunk to storage and returns a line of facts (of
synthetic images also their lines of the index), so pixels never pass through the driver. The index is ordered by a
hash of the image id, whatever the parts are.

Input: an ingest artifact and image ids, or a generate artifact. Output: a `view` artifact: `chunks/*.npy`,
`index.parquet` (image_id, split, chunk, row, labels and attributes; real ones also patient_id and site, synthetic ones,
whose image_id is the row key, source_image_id).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysynth.core.artifacts import Artifact
from raysynth.core.cache import local_folder
from raysynth.core.errors import Damaged, DataError
from raysynth.core.experiment import Experiment
from raysynth.core.identity import content_digest, sha256_bytes
from raysynth.core.presets import resolve_image
from raysynth.core.progress import Progress
from raysynth.core.schemas import ATTRIBUTE, LABEL, from_parquet, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.images import decode_png, to_size
from raysynth.data.views import CHUNKS, INDEX, View, npy_bytes
from raysynth.stages.generated import load_index, read_part, synthetic_set_of

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
    _decode(storage, view, write_chunk, work, index.num_rows)
    view.put(INDEX, to_parquet(index))
    view.commit({"images": index.num_rows, "chunks": len(work)})
    return view


def build_synthetic_view(experiment: Experiment, storage: Storage, generated: Artifact, size: int) -> Artifact:
    """The view of every image that `generated` lists as ok, at `size` pixels; returned at once where it exists.

    Args:
        generated: a complete generate artifact; its experiment's `name` need not be this one's.

    Raises:
        Damaged: a part is gone or not what was committed.
    """
    spec = resolve_image(experiment.data.image)
    config = {"size": size, "channels": spec.channels, "fit": spec.fit, "source": "synthetic"}
    view = Artifact.at(storage, STAGE, experiment.name, STAGE_VERSION, config, {"images": generated.digest()})
    if view.complete:
        return view
    rows = load_index(generated)
    rows = rows[rows["status"] == "ok"]
    store = synthetic_set_of(generated)
    work = [
        _work(view, store.file(str(part)), sorted(mine["place"]), size, number, str(spec.fit))
        for number, (part, mine) in enumerate(rows.groupby("part", sort=True))
    ]
    facts = _decode(storage, view, write_synthetic_chunk, work, len(rows))
    index = _hash_order(pa.concat_tables(from_parquet(fact["index"]) for fact in facts))
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
            table = from_parquet(f, kept)
        rows = [i for i, name in enumerate(table["image_id"].to_pylist()) if name in ids]
        if not rows:
            continue
        work.append(_work(view, part, rows, size, number, fit))
        tables.append(_placed(table.take(rows), work[-1]["chunk"]))
    if not tables:
        return pa.table({"image_id": pa.array([], pa.string())}), []
    return _hash_order(pa.concat_tables(tables)), work


def _work(view: Artifact, part: str, rows: list[int], size: int, number: int, fit: str) -> dict[str, Any]:
    """What the task of one part file is told."""
    return {"part": part, "rows": rows, "chunk": view.file(f"{CHUNKS}/{number:05d}.npy"), "size": size, "fit": fit}


def _placed(table: pa.Table, chunk: str) -> pa.Table:
    """`table` with the chunk and row that its images have."""
    table = table.append_column("chunk", pa.array([Path(chunk).name] * table.num_rows, pa.string()))
    return table.append_column("row", pa.array(range(table.num_rows), pa.int64()))


def _hash_order(table: pa.Table) -> pa.Table:
    keys = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in table["image_id"].to_pylist()]
    return table.take(sorted(range(len(keys)), key=keys.__getitem__))


def _decode(
    storage: Storage, view: Artifact, write: Callable[..., dict[str, Any]], work: list[dict[str, Any]], total: int
) -> list[dict[str, Any]]:
    """Has every chunk written. Returns what the tasks say of them, in any order.

    Raises:
        Damaged: a task says that its part is.
    """
    import ray.data

    from raysynth.stages.cluster import quiet_data_context

    quiet_data_context()
    # One row a block: a small list would otherwise become one task.
    rows = ray.data.from_items(work, override_num_blocks=len(work)).map(
        write, fn_kwargs={"storage": storage}, num_cpus=1
    )
    facts = []
    with Progress(STAGE, total, "images") as progress:
        for row in rows.iter_rows():
            if row.get("damaged"):
                raise Damaged(row["damaged"])
            view.register(f"{CHUNKS}/{Path(row['chunk']).name}", row["sha256"])
            progress.advance(int(row["images"]))
            facts.append(row)
    return facts


def write_chunk(row: dict[str, Any], storage: Storage) -> dict[str, Any]:
    """Decodes and resizes the wanted rows of one part file and writes them as one chunk; runs in a Ray Data task."""
    with storage.open(row["part"]) as f:
        images = from_parquet(f, ["image"])["image"]
    return _write(row, images.take(pa.array(row["rows"])), storage)


def write_synthetic_chunk(row: dict[str, Any], storage: Storage) -> dict[str, Any]:
    """As `write_chunk` for a part of a synthetic set; also says its lines of the index, or that it is damaged.

    Ray Data would hand on an error as its own, with this one's words inside a traceback.
    """
    try:
        data = read_part(storage, row["part"])
    except Damaged as damaged:
        return {"chunk": row["chunk"], "damaged": str(damaged)}
    table = from_parquet(data).take(pa.array(row["rows"]))
    names = (n for n in table.column_names if n.startswith((LABEL, ATTRIBUTE)))
    index = table.select(["row_key", "source_image_id", "split", *names]).rename_columns({"row_key": "image_id"})
    return {**_write(row, table["image"], storage), "index": to_parquet(_placed(index, row["chunk"])), "damaged": ""}


def _write(row: dict[str, Any], images: pa.ChunkedArray, storage: Storage) -> dict[str, Any]:
    pixels = [to_size(decode_png(cell["bytes"]), int(row["size"]), row["fit"]) for cell in images.to_pylist()]
    data = npy_bytes(np.stack(pixels))
    storage.put(row["chunk"], data)
    return {"chunk": row["chunk"], "sha256": sha256_bytes(data), "images": len(pixels)}
