"""Writes the images of a complete generate artifact as a data set that other libraries open.

Input: a generate artifact. Output, in any folder or bucket:

    README.md                   the data card; with it the export is complete
    data/train-00000.parquet    huggingface: pictures, class names, every column of the synthetic table
    data/train-00000.tar        webdataset: <row key>.png and <row key>.json
    train/<class>/<row key>.png and train/metadata.csv      folders
    .export/export.json         which export this is; created before anything else
    .export/00012.json          group 12 is written: its files with size and sha256, and its counts

A group is a run of parts of about `file_mb`, in the order of shards. One Ray task reads and writes one group, on
whatever node has a core: images go from storage to storage through it, never through the driver, so that a cluster
exports as fast as all its network cards. Names and bytes follow from artifact and file size alone: a group that is
written twice, or by two drivers, is the same files.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import ConfigError, RaysynthError, require
from raysynth.core.identity import plain, sha256_bytes
from raysynth.core.progress import Progress, say
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.stages.cluster import Resources, require_shared_folder
from raysynth.stages.export_card import Source, data_card
from raysynth.stages.export_formats import FORMATS, METADATA, Vocabulary, counts_of, export_rows
from raysynth.stages.generated import index_tables, read_part, synthetic_set_of
from raysynth.stages.pipeline import Pipeline, is_sweep
from raysynth.synth.sets import SyntheticSet

EXPORT_VERSION = 1
FILE_MB = 500
BOOKS = ".export"
_THREADS = 16  # concurrent requests of one process; a class folder export puts one object an image
QUEUE = 2  # tasks submitted a CPU: the next is there when one ends, and few are serialised early


@dataclass(frozen=True)
class Group:
    """What one task writes."""

    number: int
    parts: tuple[tuple[str, np.ndarray], ...]
    """Names of parts and the places (N,) wanted of each."""
    rows: int
    size: float
    """Bytes, about."""


@dataclass(frozen=True)
class Export:
    """One export, begun or done. Picklable: a task needs nothing else but its group."""

    store: SyntheticSet
    out: Storage
    to: str
    vocabulary: Vocabulary


def export(
    generated: Artifact,
    images: Artifact,
    to: str,
    out: str,
    connect: Callable[[], Resources],
    file_mb: int = FILE_MB,
) -> str:
    """Writes whatever of the export is missing. Returns the URL of its folder.

    Args:
        generated: a complete generate artifact. images: the ingest artifact its plan was made of.
        to: one of `FORMATS`.
        out: a folder or s3://bucket/prefix, empty or with this very export begun in it.
        connect: joins or starts Ray; called only if something is to be written.

    Raises:
        ConfigError: unknown format, or another export or other files are in `out`.
        NotReady: `generated` is not complete.
        Damaged: a part is gone or not what was committed.
    """
    job, groups = begin(generated, images, to, out, file_mb)
    books = written(job, groups)
    left = [g for g in groups if g.number not in books]
    total = sum(g.rows for g in groups)
    if left:
        resources = connect()
        if resources.nodes > 1 and not job.out.root.startswith("s3://"):
            require_shared_folder(job.out.root)
        with Progress("export", total, "images", done=total - sum(g.rows for g in left)) as progress:
            for book in write_side_by_side(job, left, resources):
                books[book["group"]] = book
                progress.advance(book["rows"])
    finish(job, generated, images, books)
    size = sum(n for book in books.values() for n, _ in book["files"].values())
    say(f"export: {total:,} images, {size / 1e6:,.1f} MB, {to} in {job.out.root}")
    return job.out.root


def check_options(to: str, out: str, file_mb: int) -> None:
    """Raises ConfigError for options that no export has."""
    near = difflib.get_close_matches(to, FORMATS, n=1)
    require(to in FORMATS, "--to", to, f"one of {', '.join(FORMATS)}", f"Did you mean {near[0]}?" if near else "")
    require(bool(out), "--out", out, "a folder or s3://bucket/prefix, empty or with this export begun in it")
    require(file_mb >= 1, "--file-mb", file_mb, ">= 1 (megabytes a file)")


def begin(
    generated: Artifact, images: Artifact, to: str, out: str, file_mb: int = FILE_MB
) -> tuple[Export, list[Group]]:
    """Takes the folder for this export and cuts the artifact's ok rows into groups."""
    check_options(to, out, file_mb)
    digest = generated.digest()
    storage, target = generated.storage, open_storage(out)
    vocabulary = json.loads(storage.get(images.file("vocabulary.json")))
    attributes = tuple(vocabulary["attributes"])
    job = Export(
        synthetic_set_of(generated), target, to,
        Vocabulary(tuple(vocabulary["classes"]), attributes, vocabulary["kind"] == "single"),
    )  # fmt: skip
    record = {
        "version": EXPORT_VERSION, "to": to, "file_mb": file_mb, "images": generated.path, "digest": digest,
        "classes": list(job.vocabulary.classes), "attributes": list(attributes),
    }  # fmt: skip
    _take(target, record)
    return job, list(cut(generated, job.store, file_mb * 10**6))


def _take(out: Storage, record: dict[str, Any]) -> None:
    """Creates `export.json`. Raises ConfigError where the folder is another's."""
    name = f"{BOOKS}/export.json"
    if not out.exists(name):
        # One listing call where there are folders, whatever is in them.
        if out.folders() or out.list():
            raise ConfigError("--out", out.root, "empty, or hold this export", "Choose another folder.")
        out.create(name, (json.dumps(record, indent=1) + "\n").encode())
    there = json.loads(out.get(name))
    changed = [f"{k}: {there.get(k)!r} there, {record[k]!r} asked for" for k in record if there.get(k) != record[k]]
    if changed:
        raise ConfigError(
            "--out", out.root, f"empty, or hold this export (another is in it: {'; '.join(changed)})",
            "Choose another folder, or delete that export first.",
        )  # fmt: skip


def cut(generated: Artifact, store: SyntheticSet, file_bytes: int) -> Iterator[Group]:
    """The artifact's ok rows, by shard and place, in groups of about `file_bytes` of stored parts."""
    shards, places, names = _ok_rows(generated)
    if not len(shards):
        return
    order = np.lexsort((places, shards))
    shards, places = shards[order], places[order]
    numbers, starts = np.unique(shards, return_index=True)
    prefix = len(store.path) + 1
    size = {e.path[prefix:]: e.size for e in store.storage.list(store.file("parts"))}
    rows = {s: n for wave in store.waves() for s, n in zip(wave.shards, wave.shard_rows)}
    held: list[tuple[str, np.ndarray]] = []
    weight, count = 0.0, 0
    for shard, mine in zip(numbers.tolist(), np.split(places, starts[1:])):
        a_row = size.get(names[shard], 0) / rows[shard]
        # A part larger than a file is read once for each file it goes into.
        for piece in np.array_split(mine, max(1, min(len(mine), round(len(mine) * a_row / file_bytes)))):
            if held and weight + len(piece) * a_row > file_bytes:
                yield Group(count, tuple(held), sum(len(p) for _, p in held), weight)
                held, weight, count = [], 0.0, count + 1
            held.append((names[shard], piece))
            weight += len(piece) * a_row
    yield Group(count, tuple(held), sum(len(p) for _, p in held), weight)


def _ok_rows(generated: Artifact) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Shard and place (N,) int32 of every ok row, 8 bytes a row; the part of each shard."""
    shards, places = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    names: dict[int, str] = {}
    for table in index_tables(generated, ["status", "shard", "place", "part"]):
        table = table.filter(pc.equal(table["status"], "ok"))
        shards.append(table["shard"].to_numpy().astype(np.int32))
        places.append(table["place"].to_numpy().astype(np.int32))
        pairs = table.group_by(["shard", "part"]).aggregate([])
        names |= dict(zip(pairs["shard"].to_pylist(), pairs["part"].to_pylist()))
    return np.concatenate(shards), np.concatenate(places), names


def written(job: Export, groups: list[Group]) -> dict[int, dict[str, Any]]:
    """Group -> its book, for groups all of whose files are there in full."""
    size = {e.path: e.size for e in job.out.list()}
    names = [f"{BOOKS}/{g.number:05d}.json" for g in groups]
    with ThreadPoolExecutor(_THREADS) as pool:
        books = pool.map(lambda n: json.loads(job.out.get(n)) if n in size else None, names)
    return {
        book["group"]: book for book in books
        if book and all(size.get(name) == n for name, (n, _) in book["files"].items())
    }  # fmt: skip


def write_group(job: Export, group: Group) -> dict[str, Any]:
    """Writes a group's files, then its book. What a task does.

    Raises:
        Damaged: a part is gone or not what was committed.
    """
    rows = pa.concat_tables([_read(job, part, places) for part, places in group.parts])
    files: dict[str, tuple[int, str]] = {}

    def put(named: tuple[str, bytes]) -> None:
        name, data = named
        job.out.put(name, data)
        files[name] = len(data), sha256_bytes(data)

    with ThreadPoolExecutor(_THREADS) as pool:
        for split in pc.unique(rows["split"]).sort().to_pylist():
            mine = rows.filter(pc.equal(rows["split"], split))
            list(pool.map(put, FORMATS[job.to](mine, split, group.number, job.vocabulary)))
    splits = {v["values"]: v["counts"] for v in pc.value_counts(rows["split"]).to_pylist()}
    book = {
        "group": group.number, "rows": rows.num_rows, "splits": splits,
        "counts": counts_of(rows, job.vocabulary), "files": dict(sorted(files.items())),
    }  # fmt: skip
    job.out.put(f"{BOOKS}/{group.number:05d}.json", (json.dumps(book, sort_keys=True) + "\n").encode())
    return plain(book, "book")


def _read(job: Export, part: str, places: np.ndarray) -> pa.Table:
    data = read_part(job.store.storage, job.store.file(part))
    return export_rows(from_parquet(data).take(pa.array(places)), job.vocabulary)


def write_side_by_side(job: Export, groups: list[Group], resources: Resources) -> Iterator[dict[str, Any]]:
    """Books of the groups as they are done, one task a core."""
    import ray

    # Stored parts, the rows of them, and the encoded file: about three times a file's bytes at once.
    task = ray.remote(num_cpus=1, memory=round(3 * max(g.size for g in groups)), max_retries=3)(write_group)
    shared, waiting = ray.put(job), []
    try:
        for group in groups:
            waiting.append(task.options(name=f"export {group.number}").remote(shared, group))
            if len(waiting) >= QUEUE * max(1, resources.cpus):
                done, waiting = ray.wait(waiting)
                yield from ray.get(done)
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaysynthError):
            raise error.cause from None
        raise


def finish(job: Export, generated: Artifact, images: Artifact, books: dict[int, dict[str, Any]]) -> None:
    """Writes what is about the whole: `metadata.csv` of class folders, and the data card last."""
    ordered = [books[number] for number in sorted(books)]
    card = data_card(Source.read(generated, images), job.to, job.vocabulary, ordered).encode()
    try:
        if job.out.get("README.md") == card:
            return
    except FileNotFoundError:
        pass
    for split in sorted({s for book in ordered for s in book["splits"]}) if job.to == "folders" else ():
        shares = [f"{BOOKS}/{split}-{b['group']:05d}.csv" for b in ordered if split in b["splits"]]
        with ThreadPoolExecutor(_THREADS) as pool:
            first, *rest = pool.map(job.out.get, shares)
        whole = first + b"".join(text.partition(b"\n")[2] for text in rest)
        job.out.put(f"{split}/{METADATA}", whole)
    job.out.put("README.md", card)


def rendered_by(pipeline: Pipeline, name: str | None = None) -> Pipeline:
    """The pipeline whose images an experiment is about: its own, or those of the arm named.

    Raises:
        ConfigError: an arm must be named, or is not one with synthetic images.
    """
    if not is_sweep(pipeline.experiment):
        require(name is None, "--arm", name, "left out", "This experiment has no arms.")
        return pipeline
    # Of an arm's seeds the first one's: with seeds of the subset or the plan each has a selection of its own.
    arms = {arm.name: p for arm, p in reversed(pipeline.arm_pipelines) if p.experiment.training_set.needs_synthetic}
    if name is None and len({p.generated.path for p in arms.values()}) == 1:
        return next(iter(arms.values()))
    require(name in arms, "--arm", name, f"one of: {'; '.join(sorted(arms))}", "Each arm has its own images.")
    return arms[str(name)]
