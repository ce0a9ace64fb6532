"""Real images -> the image table: every picture decoded, stored alike, grouped by patient and split.

Two passes of Ray Data tasks (never a pool of actors, so that two CPUs suffice). In the first, one task reads and
decodes one slice of the source and writes it to `work/`; only hashes, sizes and reasons come back. The driver finds
patients and splits. In the second, one task writes one part. Parts are cut by the size of the picture, not by
`compute`, so that equal data gives equal bytes; finished slices are found again after a crash.

Outputs: `images/part-*.parquet`, `table.parquet` (without pictures and reports), `vocabulary.json`, and beside them
`quarantine.parquet`. `source_uri` is relative to the image folder, which `run.json` names: a data set that is moved
keeps its name, and so do the generators and images made from it. Where the data grew, `data.split.keep` names the
artifact from before, whose patients keep their splits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import DataError
from raysynth.core.experiment import Data, Experiment, ImageSpec
from raysynth.core.identity import fp12, sha256_bytes
from raysynth.core.presets import resolve_image
from raysynth.core.progress import Progress, say
from raysynth.core.schemas import ATTRIBUTE, from_parquet, image_schema, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.attributes import categories
from raysynth.data.earlier import earlier_splits, kept_note, read_earlier
from raysynth.data.grouping import patients_and_units
from raysynth.data.images import FULL_16_BIT
from raysynth.data.labels import label_array
from raysynth.data.quarantine import Quarantine
from raysynth.data.sources import SourceListing, list_source, require_positives
from raysynth.data.splits import SPLITS, assign_splits, require_every_split
from raysynth.stages import cluster
from raysynth.stages.ingest_tasks import FACTS, decode_slice, write_part

STAGE_VERSION = 4

UNHASHED = ("path", "images", "licence", "max_quarantined_fraction")
"""Keys of `data` that change no pixel and no annotation: what the source holds enters by the listing's digest."""

PART_BYTES = 128 << 20
"""Decoded bytes of the images in one part; encoded they are several times smaller."""
LARGEST_PART = 4096


def ingest_artifact(experiment: Experiment, storage: Storage, tested: bool = False) -> tuple[Artifact, SourceListing]:
    """The artifact of the experiment's data as it is now, complete or not, and what the source holds.

    Args:
        tested: it is an external test set: every image is a test image, however its source splits them.

    Raises:
        DataError: the source cannot be listed.
    """
    data = experiment.data
    if tested:
        data = dataclasses.replace(data, columns=dataclasses.replace(data.columns, split=None))
    listing = list_source(data, experiment.name)
    data = dataclasses.replace(data, dataset=data.dataset or experiment.name, image=resolve_image(data.image))
    config = {k: v for k, v in dataclasses.asdict(data).items() if k not in UNHASHED}
    del config["labels"]["policy"]  # applied where labels are used
    inputs = {"source": listing.digest}
    if tested:
        config["split"] = {"all": "test", **{k: config["split"][k] for k in ("patients", "hash_distance")}}
    elif keep := config["split"].pop("keep"):
        inputs["keep"] = sha256_bytes(read_earlier(keep))
    return Artifact.at(storage, "ingest", experiment.name, STAGE_VERSION, config, inputs), listing


def load_table(storage: Storage, artifact: Artifact) -> pa.Table:
    """All columns of the image table but pictures and reports, in source order."""
    return from_parquet(storage.get(artifact.file("table.parquet")))


def load_vocabulary(storage: Storage, artifact: Artifact) -> dict[str, Any]:
    """`vocabulary.json`: kind, classes, attributes and counts."""
    return json.loads(storage.get(artifact.file("vocabulary.json")))


def ingest(experiment: Experiment, storage: Storage, tested: bool = False) -> Artifact:
    """Makes the image table of `ingest_artifact`, unless it is there. Ray is connected by the caller.

    Raises:
        DataError: the data cannot be used as described.
        GateFailed: more rows were quarantined than `data.max_quarantined_fraction`; the message says where they are
            listed.
    """
    artifact, listing = ingest_artifact(experiment, storage, tested)
    if artifact.complete:
        say(f"ingest: {artifact.path} is complete")
        _clear_work(artifact)
        return artifact
    data = experiment.data
    gate = (data.max_quarantined_fraction, storage, artifact.file("quarantine.csv"))
    quarantine = Quarantine(listing)
    quarantine.check(*gate)  # before hours of decoding

    slices = _slices(listing.rows.num_rows, part_rows(data.image), experiment.compute.ingest_rows)
    work = [_work_file(artifact, listing, start, stop) for start, stop in slices]
    facts = _decode(artifact, data, listing, slices, work)
    quarantine.add({row: why for row, why in enumerate(facts["reason"].to_pylist()) if why is not None})
    quarantine.check(*gate)
    rows, by, notes = _assign(data, listing, facts, quarantine, tested)
    quarantine.check(*gate)

    schema = image_schema(listing.classes, listing.attributes)
    _write_parts(artifact, data, rows, schema, slices, work)
    table = rows.select([name for name in schema.names if name not in ("image", "report")])
    vocabulary = _vocabulary(data, listing, table)
    artifact.put("table.parquet", to_parquet(table))
    artifact.put("vocabulary.json", (json.dumps(vocabulary, indent=1) + "\n").encode())
    counts = {
        "images": table.num_rows, "patients": len(pc.unique(table["patient_id"])), "patients_by": by,
        "splits": vocabulary["counts"], "quarantined": quarantine.kinds(),
    }  # fmt: skip
    storage.delete(artifact.file("quarantine.csv"))
    # No output: a file more that no row names must not be other data.
    storage.put(artifact.file("quarantine.parquet"), to_parquet(quarantine.table()))
    source = {"path": data.path, "images": data.images}
    artifact.commit(counts, data=source, licence=data.licence, notes=notes)
    _clear_work(artifact)
    _summarise(artifact, counts, notes)
    return artifact


def part_rows(spec: ImageSpec) -> int:
    """Source rows of one part: a function of the stored picture only."""
    channels = 3 if resolve_image(spec).channels == "rgb" else 1
    return max(64, min(LARGEST_PART, PART_BYTES // (spec.size * spec.size * channels)))


def _slices(rows: int, part: int, rows_per_task: int) -> list[tuple[int, int]]:
    """Half-open row ranges of at most `rows_per_task` that no part boundary cuts."""
    return [
        (start, min(start + rows_per_task, stop))
        for first in range(0, rows, part)
        for stop in (min(first + part, rows),)
        for start in range(first, stop, rows_per_task)
    ]


def _work_file(artifact: Artifact, listing: SourceListing, start: int, stop: int) -> str:
    """Named by what is in it, so that a later run finds it whatever else changed."""
    locations = listing.rows["location"].slice(start, stop - start).to_pylist()
    return artifact.file(f"work/{start:09d}-{fp12(locations)}.parquet")


def _run_tasks(items: list[dict[str, Any]], task: Any, **kwargs: Any) -> Iterator[pa.Table]:
    """One Ray task an item; the tables they return, as they finish."""
    import ray

    cluster.quiet_data_context()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        task, batch_size=1, batch_format="pyarrow", fn_kwargs=kwargs, num_cpus=1
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _decode(
    artifact: Artifact, data: Data, listing: SourceListing, slices: list[tuple[int, int]], work: list[str]
) -> pa.Table:
    """First pass: writes the work files that are not there. Returns FACTS of every listed row, in order."""
    locations = listing.rows["location"].to_pylist()
    items = [
        {"file": file, "start": start, "locations": locations[start:stop]}
        for file, (start, stop) in zip(work, slices)
    ]
    tables = []
    with Progress("ingest", len(locations), "images") as progress:
        for facts in _run_tasks(items, decode_slice, storage=artifact.storage, data=data):
            tables.append(facts.cast(FACTS))
            progress.advance(facts.num_rows, failed=facts.num_rows - facts["reason"].null_count)
    return pa.concat_tables(tables).sort_by("row")


def _assign(
    data: Data, listing: SourceListing, facts: pa.Table, quarantine: Quarantine, tested: bool
) -> tuple[pa.Table, str, list[str]]:
    """Patients and splits: the rows of the image table without pictures, how patients were told, and notes."""
    bad = {row: why for row, why in enumerate(facts["reason"].to_pylist()) if why is not None}
    require_positives(listing.classes, label_array(listing.rows, listing.classes), bad, "images that can be decoded")
    good = pc.is_null(facts["reason"])
    rows, facts = listing.rows.filter(good), facts.filter(good)
    if not rows.num_rows:
        raise DataError("data.path", data.path, "a source with at least one image that can be decoded")
    labels = label_array(rows, listing.classes)
    by = data.split.patients or ("column" if data.columns.patient else "none" if data.kind == "digits" else "hash")
    patients, units = patients_and_units(
        rows["image_id"].to_pylist(),
        rows["patient"].to_pylist() if by == "column" else None,
        facts["pixel_sha256"].to_pylist(),
        facts["phash"].to_numpy() if by == "hash" else None,
        data.split.hash_distance,
    )
    fixed = ["test"] * rows.num_rows if tested else rows["split"].to_pylist()
    ids, earlier, notes = rows["image_id"].to_pylist(), None, list(listing.notes)
    if data.split.keep and not tested:
        table = from_parquet(read_earlier(data.split.keep))
        earlier = earlier_splits(table, ids, facts["pixel_sha256"].to_pylist(), patients if by == "column" else None)
        notes.append(kept_note(table, ids, earlier))
    result = assign_splits(units, patients, fixed, labels == 1, data.split, earlier)
    quarantine.add({facts["row"][i].as_py(): why for i, why in result.conflicts.items()})
    columns = {"split": result.split, "patient_id": patients}
    columns |= {name: facts[name] for name in FACTS.names if name not in ("reason", "phash", "highest")}
    table = rows.drop_columns(["split", "patient", "location"])
    for name, column in columns.items():
        table = table.append_column(name, column if isinstance(column, pa.ChunkedArray) else pa.array(column))
    kept = np.array([i not in result.conflicts for i in range(table.num_rows)], bool)
    table = table.filter(pa.array(kept))
    notes += _dark(facts)
    if by == "hash":
        notes.append("patients are told apart by near-identical pictures only; map data.columns.patient if you can")
    if result.carved:
        notes.append(f"the data fixes no {' and no '.join(result.carved)}; taken from its train images")
    notes += require_every_split(
        data.labels.kind, listing.classes, labels[kept] == 1, table["split"].to_pylist(), fixed
    )
    return table, by, notes


def _dark(facts: pa.Table) -> list[str]:
    """A note on 16-bit images that use less than a quarter of their range, as 12-bit films do."""
    wide = facts.filter(pc.equal(facts["value_hi"], FULL_16_BIT))
    dark = wide.filter(pc.less(wide["highest"], FULL_16_BIT / 4))
    if not dark.num_rows:
        return []
    return [
        f"{dark.num_rows:,} of {wide.num_rows:,} 16-bit images stay below a quarter of their range (none above "
        f"{pc.max(dark['highest']).as_py():g}) and are stored nearly black; data.image.value_range=percentile uses "
        "each image's own range"
    ]


def _write_parts(
    artifact: Artifact, data: Data, rows: pa.Table, schema: pa.Schema, slices: list[tuple[int, int]], work: list[str]
) -> None:
    """Second pass: writes `images/part-*.parquet` and registers them."""
    size = part_rows(data.image)
    parts = pc.divide(rows["row"], size).to_numpy()
    items = []
    for part in np.unique(parts):
        of_part = np.flatnonzero(parts == part)
        facts = rows.slice(of_part[0], len(of_part))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, facts.schema) as writer:
            writer.write_table(facts)
        items.append({
            "name": f"images/part-{len(items):05d}.parquet", "rows": sink.getvalue().to_pybytes(),
            "work": [file for file, (start, _) in zip(work, slices) if start // size == part],
        })  # fmt: skip
    with Progress("ingest: parts", len(items), "parts") as progress:
        for done in _run_tasks(items, write_part, artifact=artifact, schema=schema, row_group=max(1, size // 8)):
            for name, sha256 in zip(done["name"].to_pylist(), done["sha256"].to_pylist()):
                artifact.register(name, sha256)
                progress.advance(1)


def _vocabulary(data: Data, listing: SourceListing, table: pa.Table) -> dict[str, Any]:
    positives, split = label_array(table, listing.classes) == 1, np.array(table["split"].to_pylist())
    counts = {
        name: {"images": int((split == name).sum())}
        | {c: int(n) for c, n in zip(listing.classes, positives[split == name].sum(axis=0))}
        for name in SPLITS
    }
    return {
        "kind": data.labels.kind,
        "classes": listing.classes,
        "attributes": {
            name: categories(name, table[ATTRIBUTE + name], data.age_bins) for name in listing.attributes
        },
        "counts": counts,
    }


def _clear_work(artifact: Artifact) -> None:
    for entry in artifact.storage.list(artifact.file("work")):
        artifact.storage.delete(entry.path)


def _summarise(artifact: Artifact, counts: dict[str, Any], notes: list[str]) -> None:
    say(f"ingest: {counts['images']:,} images of {counts['patients']:,} patients in {artifact.path}")
    names = list(counts["splits"]["train"])
    width = max(len(n) for n in names)
    say(f"  {'':<{width}}" + "".join(f"{split:>9}" for split in SPLITS))
    for name in names:
        say(f"  {name:<{width}}" + "".join(f"{counts['splits'][split][name]:>9,}" for split in SPLITS))
    for kind, count in counts["quarantined"].items():
        say(f"  quarantined: {count:,} {kind}")
    for note in notes:
        say(f"  note: {note}")
