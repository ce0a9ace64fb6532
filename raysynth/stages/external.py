"""A synthetic set that was rendered elsewhere (`generator.kind: external`): its listing is judged, then taken in.

Input: a CSV beside a folder of images, or parquet with images or paths; local or s3://. In place of a generator there
is an artifact `train-generator/<name>-<fp>/` with `rows.parquet` (the usable rows: labels over the real data's
vocabulary, attributes, source, prompt, seed, guidance, location) and `quarantine.parquet` (the others and why). The
plan is those rows in stratified order; the engine then reads each image as if it rendered it. The set's identity is
the digest of the listing and of the files' sizes and etags, and how images become pixels: real data that grow leave
it as it is. No row rests on a validation or test image, nor on one of their patients, where the listing says on whom.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import DataError
from raysynth.core.experiment import Columns, Compute, Data, Experiment
from raysynth.core.identity import canonical_json
from raysynth.core.presets import resolve_image
from raysynth.core.progress import say
from raysynth.core.schemas import (
    ATTRIBUTE,
    LABEL,
    LOCATION,
    attribute_names,
    from_parquet,
    label_names,
    plan_schema,
    to_parquet,
)
from raysynth.core.storage import Storage
from raysynth.data.quarantine import Quarantine
from raysynth.data.sources import SourceListing, list_source
from raysynth.data.strata import seeded_order, stratified_order
from raysynth.synth.wanted import Wanted

STAGE = "train-generator"
STAGE_VERSION, IMPORT_VERSION = 3, 2
"""Of how rows are judged and their cells read; of how images become pixels, and so of the set."""
MODE = "external"
EXTRA = ("source", "patient", "prompt", "seed", "guidance")
"""Keys of generator.columns beside those that real data have; read as attributes are: text, null for nothing."""
MICRO_BATCH, SHARD_ROWS = 64, 512
"""Where none is typed: reading needs no measurement."""


def listing_data(e: Experiment, classes: list[str]) -> Data:
    """The listing as a source of images.

    Args:
        classes: the real data's vocabulary.
    """
    g, c = e.generator, e.generator.columns
    extra = {f"import_{name}": str(getattr(c, name)) for name in EXTRA if getattr(c, name)}
    return Data(
        kind="csv" if g.path.lower().endswith(".csv") else "parquet", path=g.path, images=g.images,
        columns=Columns(c.file, c.id, c.label, c.findings, attributes={**c.attributes, **extra}),
        labels=dataclasses.replace(e.data.labels, classes=classes, policy={}), image=e.data.image,
        age_bins=e.data.age_bins,
    )  # fmt: skip


@dataclass(frozen=True)
class _Listing:
    """A source to be listed; two of equal content are one."""

    content: str
    data: Data = field(compare=False)


@lru_cache(maxsize=8)
def _list_once(listing: _Listing) -> SourceListing:
    # A process sees one state of the listing, and the arms of a sweep list its hundred thousand files once.
    return list_source(listing.data, MODE, every_class=False)


def _listed(e: Experiment, storage: Storage, images: Artifact) -> SourceListing:
    classes = list(json.loads(storage.get(images.file("vocabulary.json")))["classes"])
    data = listing_data(e, classes)
    try:
        return _list_once(_Listing(canonical_json(data), data))
    except DataError as error:  # it speaks of the section `data`
        key = error.key.replace("data.", "generator.", 1) if not error.key.startswith("data.labels") else error.key
        remedy = error.remedy.replace("data.columns", "generator.columns")
        raise DataError(key.replace("attributes.import_", ""), error.got, error.allowed, remedy) from error


def import_artifact(e: Experiment, storage: Storage, images: Artifact) -> tuple[Artifact, SourceListing]:
    """The artifact of the listing as it is now, judged against these real images; complete or not.

    Raises:
        DataError: the listing cannot be read.
    """
    digest = images.digest()
    listing = _listed(e, storage, images)
    config = {"kind": e.generator.kind, "on_held_out": e.generator.on_held_out}
    inputs = {"images": digest, "listing": _generator_id(e, listing)}
    return Artifact.at(storage, STAGE, e.name, STAGE_VERSION, config, inputs), listing


def take_listing(e: Experiment, storage: Storage, images: Artifact) -> Artifact:
    """Reads and judges the listing, unless that is done.

    Raises:
        DataError: it cannot be read; a row rests on a held-out image and `generator.on_held_out` is `refuse`.
        GateFailed: more rows are left out than `data.max_quarantined_fraction`.
    """
    artifact, listing = import_artifact(e, storage, images)
    if artifact.complete:
        say(f"{STAGE}: nothing to train; {artifact.path} lists the images of {e.generator.path}")
        return artifact
    rows, quarantine = _judged(e, storage, images, listing)
    # No output: a file more that no row names must not be another listing.
    storage.put(artifact.file("quarantine.parquet"), to_parquet(quarantine.table()))
    quarantine.check(e.data.max_quarantined_fraction, storage, artifact.file("quarantine.csv"))
    if not rows.num_rows:
        raise DataError("generator.path", e.generator.path, "a listing with at least one usable row")
    artifact.put("rows.parquet", to_parquet(rows))
    counts = {"images": rows.num_rows, "quarantined": quarantine.kinds(), "n_real_generator": None, "steps": None}
    artifact.commit(counts, taken_from=e.generator.path, generator_id=_generator_id(e, listing))
    say(f"{STAGE}: nothing to train; {rows.num_rows:,} images listed at {e.generator.path}, "
        f"{quarantine.table().num_rows:,} left out; {artifact.path}")  # fmt: skip
    for kind, count in quarantine.kinds().items():
        say(f"  quarantined: {count:,} {kind}")
    return artifact


def _judged(e: Experiment, storage: Storage, images: Artifact, listing: SourceListing) -> tuple[pa.Table, Quarantine]:
    """The usable rows, and the others with why. Raises DataError for held-out sources where these are refused."""
    table = from_parquet(storage.get(images.file("table.parquet")))
    quarantine = Quarantine(listing)
    held_out = _held_out(listing.rows, table)
    if held_out and e.generator.on_held_out == "refuse":
        row, why = next(iter(held_out.items()))
        raise DataError(
            "generator.path", f"{len(held_out):,} rows like {listing.rows['image_id'][row].as_py()!r}: {why}",
            "images made from train images of this experiment",
            "Leave them out by generator.on_held_out: quarantine. Where their sources are other data, leave "
            "generator.columns.source and patient out. Splits must be those under which its generator was trained: "
            "see data.split.keep.",
        )  # fmt: skip
    bad = held_out | _not_numbers(listing.rows)
    quarantine.add(bad)
    good = np.array([i not in bad for i in range(listing.rows.num_rows)], bool)
    return _rows(listing.rows.filter(pa.array(good)), table), quarantine


def _generator_id(e: Experiment, listing: SourceListing) -> str:
    """What decides the set's pixels and labels: the files, the listing, how they are read and resized."""
    columns = dataclasses.asdict(e.generator.columns)
    made_of = [listing.digest, columns, resolve_image(e.data.image), listing.classes, IMPORT_VERSION]
    return hashlib.sha256(canonical_json(made_of).encode()).hexdigest()[:24]


def _extra(rows: pa.Table, name: str) -> list[str | None]:
    column = f"{ATTRIBUTE}import_{name}"
    return rows[column].to_pylist() if column in rows.column_names else [None] * rows.num_rows


def _held_out(rows: pa.Table, table: pa.Table) -> dict[int, str]:
    """Rows that rest on a validation or test image or patient, or on an image that is not known, and why."""
    splits = dict(zip(table["image_id"].to_pylist(), table["split"].to_pylist()))
    held = table.filter(pc.not_equal(table["split"], "train"))
    patients = dict(zip(held["patient_id"].to_pylist(), held["split"].to_pylist()))
    found = {}
    for i, (source, patient) in enumerate(zip(_extra(rows, "source"), _extra(rows, "patient"))):
        if source is not None and source not in splits:
            found[i] = f"source {source!r} is no image of the real data"
        elif source is not None and splits[source] != "train":
            found[i] = f"source {source!r} is a {splits[source]} image"
        elif patient in patients:
            found[i] = f"patient {patient!r} is a {patients[patient]} patient"
    return found


def _number(cell: str, bits: int) -> Decimal:
    number = Decimal("nan")
    with suppress(InvalidOperation):
        number = Decimal(cell)  # exact, which a float past 2^53 is not
    if not number.is_finite():
        raise ValueError("is no number")
    if not -(2**bits) <= number < 2**bits:
        raise ValueError("is too large")
    return number


def _seed(cell: str | None) -> int | None:
    """A whole number, also one written 12.0, as in a column with gaps. Raises ValueError for what int64 cannot hold."""
    if cell is not None and _number(cell, 63) % 1:
        raise ValueError("is no whole number")
    return None if cell is None else int(_number(cell, 63))


def _guidance(cell: str | None) -> float | None:
    """Raises ValueError for what float32 cannot hold."""
    return None if cell is None else float(_number(cell, 127))


def _not_numbers(rows: pa.Table) -> dict[int, str]:
    found = {}
    for name, read in (("seed", _seed), ("guidance", _guidance)):
        for i, cell in enumerate(_extra(rows, name)):
            try:
                read(cell)
            except ValueError as error:
                found[i] = f"{name} {cell!r} {error}"
    return found


def _rows(rows: pa.Table, table: pa.Table) -> pa.Table:
    """Listed rows as rows of a plan, without their rank."""
    labels, attributes, n = label_names(table.schema), attribute_names(table.schema), rows.num_rows
    ids, prompts = rows["image_id"].to_pylist(), _extra(rows, "prompt")
    given = rows.select([c for c in rows.column_names if c.startswith((LABEL, ATTRIBUTE))])
    given = given.select([c for c in given.column_names if not c.startswith(f"{ATTRIBUTE}import_")])
    keys = [
        _row_key(image_id, prompt, {k: v for k, v in row.items() if v is not None})
        for image_id, prompt, row in zip(ids, prompts, given.to_pylist())
    ]
    columns: dict[str, Any] = {
        "row_key": keys, "rank": [0] * n, "source_image_id": _extra(rows, "source"), "replica": [0] * n,
        "split": ["train"] * n, "mode": [MODE] * n, "prompt": prompts,
        **{LABEL + c: rows[LABEL + c] for c in labels},
        **{ATTRIBUTE + a: given[ATTRIBUTE + a] if ATTRIBUTE + a in given.column_names else [None] * n
           for a in attributes},
    }  # fmt: skip
    planned = pa.table(columns, schema=plan_schema(labels, attributes))
    more = {
        LOCATION: rows["location"],
        "seed": pa.array([_seed(cell) for cell in _extra(rows, "seed")], pa.int64()),
        "guidance_scale": pa.array([_guidance(cell) for cell in _extra(rows, "guidance")], pa.float32()),
        "derived_from_real": pa.nulls(n, pa.bool_()),
    }
    for name, column in more.items():
        planned = planned.append_column(name, column)
    return planned


def _row_key(image_id: str, prompt: str | None, known: dict[str, Any]) -> str:
    text = canonical_json({"mode": MODE, "image": image_id, "prompt": prompt, "condition": known})
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def external_plan(e: Experiment, storage: Storage, images: Artifact) -> pa.Table:
    """Every usable row of the listing by rank, in an order whose every prefix keeps the shares of the classes.

    Raises:
        DataError: as `take_listing`.
    """
    artifact, listing = import_artifact(e, storage, images)
    if artifact.complete:
        rows = from_parquet(storage.get(artifact.file("rows.parquet")))
    else:  # for a dry run
        rows, _ = _judged(e, storage, images, listing)
    order = stratified_order(
        rows, seeded_order("plan", e.plan.seed, rows["row_key"].to_pylist()), e.data.labels.policy
    )
    at = rows.schema.get_field_index("rank")
    return rows.take(pa.array(order)).set_column(at, "rank", pa.array(np.arange(rows.num_rows)))


def per_class(rows: pa.Table) -> str:
    """How many rows each class has, for people."""
    counts = {c: pc.sum(pc.equal(rows[LABEL + c], 1)).as_py() or 0 for c in label_names(rows.schema)}
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def set_identity(listed: Artifact) -> dict[str, Any]:
    """The identity of the set that the listing becomes; what rendered it elsewhere is in its rows, if anywhere."""
    found = dict.fromkeys(("sampler", "steps", "guidance_scale", "guidance_rescale"))
    return {"render_version": IMPORT_VERSION, "generator_id": listed.run_info()["generator_id"], "seed": 0, **found}


def reading(compute: Compute) -> Compute:
    """`compute` for reading: on any node's CPUs, with sizes that need no measurement."""
    sizes = {"micro_batch": compute.micro_batch or MICRO_BATCH, "shard_rows": compute.shard_rows or SHARD_ROWS}
    return dataclasses.replace(compute, accelerator=None, **sizes)


def by_location(wanted: Wanted) -> Wanted:
    """The same rows in the order in which they lie: a parquet row group is then read once and not once a row."""
    tables = list(wanted.read())
    if not tables:
        return wanted
    rows = pa.concat_tables(tables)
    split = [location.rpartition("#") for location in rows[LOCATION].to_pylist()]
    keys = [(file, int(row) if row.isdigit() else -1, row) for file, _, row in split]  # `table.parquet#17`, or a path
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return Wanted.of(rows.take(pa.array(order)))
