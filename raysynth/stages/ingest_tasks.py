"""What a worker does for ingest: decode one slice of the source, write one part of the image table.

Both take one Ray Data row and are safe to repeat: they write whole files whose content depends on their input only.
Pictures go from storage to storage; the driver gets hashes, sizes and reasons.

A picture that ends the process that decodes it would be tried for ever. So a slice is marked before its first picture
is read; found marked, it is decoded in a child process, and the picture that ends that one is quarantined.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact
from raysynth.core.experiment import Data, ImageSpec
from raysynth.core.identity import sha256_bytes
from raysynth.core.schemas import IMAGE_TYPE, from_parquet, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.images import BadImage, prepare
from raysynth.data.reading import ImageReader

FACTS = pa.schema([
    ("row", pa.int64()), ("reason", pa.string()), ("height", pa.int32()), ("width", pa.int32()),
    ("sha256", pa.string()), ("pixel_sha256", pa.string()), ("value_lo", pa.float32()), ("value_hi", pa.float32()),
    ("highest", pa.float32()), ("phash", pa.uint64()),
])  # fmt: skip
"""What a worker tells of one image; `row` counts the listing's rows, `reason` is null for a good image."""

WORK = pa.schema([*FACTS, ("png", pa.binary())])


def decode_slice(batch: pa.Table, storage: Storage, data: Data) -> pa.Table:
    """A worker's first pass over one slice: reads, decodes, stores it under `work/` and returns its FACTS."""
    item = batch.to_pylist()[0]
    if storage.exists(item["file"]):
        with storage.open(item["file"]) as file:
            return from_parquet(file, FACTS.names)
    begun = item["file"] + ".begun"
    prepared = partial(_prepared, ImageReader(data), data.image)
    decoded = map(prepared, item["locations"]) if storage.create(begun, b"") else guarded(prepared, item["locations"])
    rows = [{"row": row, **facts} for row, facts in enumerate(decoded, item["start"])]
    table = pa.Table.from_pylist(rows, schema=WORK)
    storage.put(item["file"], to_parquet(table))
    storage.delete(begun)
    return table.select(FACTS.names)


def _prepared(reader: ImageReader, spec: ImageSpec, location: str) -> dict[str, Any]:
    try:
        return vars(prepare(reader.read(location), spec))
    except BadImage as bad:
        return {"reason": bad.reason}


def guarded(task: Callable[[str], dict[str, Any]], locations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """`map(task, locations)` in a child process; a location that ends it gives a reason, and another child goes on."""
    spawn = multiprocessing.get_context("spawn")  # a worker has threads, which a fork would break
    done = 0
    while done < len(locations):
        ours, theirs = spawn.Pipe(duplex=False)
        child = spawn.Process(target=_child, args=(theirs, task, locations[done:]), daemon=True)
        child.start()
        theirs.close()
        try:
            while done < len(locations):
                facts = ours.recv()
                if isinstance(facts, Exception):
                    raise facts
                yield facts
                done += 1
        except EOFError:
            child.join()
            yield {"reason": f"undecodable: it ended the decoding process (exit code {child.exitcode})"}
            done += 1
        finally:
            ours.close()
            child.join()


def _child(pipe: Connection, task: Callable[[str], dict[str, Any]], locations: Sequence[str]) -> None:
    try:
        for location in locations:
            pipe.send(task(location))
    except Exception as error:  # noqa: BLE001 - the store's fault, to be raised where the slice is
        pipe.send(error)


def write_part(batch: pa.Table, artifact: Artifact, schema: pa.Schema, row_group: int) -> pa.Table:
    """A worker's second pass over one part: joins rows with their pictures. Returns the file's name and hash."""
    item = batch.to_pylist()[0]
    rows = pa.ipc.open_stream(item["rows"]).read_all()
    pictures = pa.concat_tables(
        [from_parquet(artifact.storage.get(file), ["row", "png"]) for file in item["work"]]
    )
    places = pc.index_in(rows["row"], pictures["row"].combine_chunks())
    png = pictures["png"].take(places).combine_chunks()
    image = pa.StructArray.from_arrays([png, pa.nulls(len(png), pa.string())], fields=list(IMAGE_TYPE))
    table = rows.append_column("image", image).select(schema.names).cast(schema)
    groups = [min(row_group, table.num_rows - start) for start in range(0, table.num_rows, row_group)]
    content = to_parquet(table, groups)
    artifact.storage.put(artifact.file(item["name"]), content)
    return pa.table({"name": [item["name"]], "sha256": [sha256_bytes(content)]})
