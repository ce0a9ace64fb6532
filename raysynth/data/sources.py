"""Lists the real images of an experiment without reading one: a row an image, and what is left out and why.

Kinds: csv (a table and a folder of images), class_folders (one folder a class, optionally below train/val/test),
parquet (images or paths in the table) and scikit-learn's digits; local or s3://. The digest covers path, size and
etag of every file, so that new data is seen. Knows no pixels: what only decoding can tell is found by the workers,
who read through `reading.ImageReader`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raysynth.core.errors import DataError
from raysynth.core.experiment import Data
from raysynth.core.identity import content_digest, sha256_bytes
from raysynth.core.schemas import ATTRIBUTE, quarantine_schema
from raysynth.core.storage import Entry, Storage
from raysynth.data.attributes import attribute_columns, known
from raysynth.data.images import SUFFIXES
from raysynth.data.labels import Annotations, check_policy, label_columns, parse_findings, parse_names
from raysynth.data.metadata import (
    Cells,
    parquet_files,
    read_csv,
    read_file,
    read_parquet,
    require_column,
    text_column,
)  # fmt: skip
from raysynth.data.reading import digit_values, image_storage, inside, link_leaves

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

NO_FILE, NO_ROW, LEAVES = "row without file", "file without row", "path leaves the image folder"
NOT_IMAGE = "not an image file"


@dataclass(frozen=True)
class SourceListing:
    """What a source holds."""

    rows: pa.Table
    """image_id, dataset, location, source_uri, site, patient, split, report, label_*, attr_*, in source order."""
    classes: list[str]
    attributes: list[str]
    quarantined: pa.Table
    """Rows and files left out (`quarantine_schema`)."""
    n_rows: int
    """Rows of the source, those left out included and files without row not."""
    digest: str
    notes: list[str]
    """What a person should know, one sentence each."""


@dataclass
class _Found:
    """Columns of a source as read, one entry a row."""

    locations: list[str]
    uris: list[str]
    ids: list[str]
    annotations: Annotations
    digest: str
    attributes: dict[str, Cells] = field(default_factory=dict)
    site: Cells | None = None
    patient: Cells | None = None
    split: Cells | None = None
    report: Cells | None = None
    bad: dict[int, str] = field(default_factory=dict)
    extra: list[tuple[str, str, str]] = field(default_factory=list)
    """(id, uri, reason) of files that are no row."""


def list_source(data: Data, name: str) -> SourceListing:
    """Every row of the source, its labels and attributes, and the digest of what is there now.

    Args:
        name: the experiment's name, the data set's name where `data.dataset` is empty.

    Raises:
        DataError: the table or folder cannot be read, a column is not there, a class has no images.
    """
    kinds = {"csv": _from_csv, "parquet": _from_parquet, "class_folders": _from_folders, "digits": _from_digits}
    found = kinds[data.kind](data)
    if not found.ids:
        raise DataError("data.path", data.path, "a source with at least one image")
    seen: set[str] = set()
    bad = {**found.annotations.bad, **found.bad}
    for row, image_id in enumerate(found.ids):
        if image_id in seen:
            bad.setdefault(row, "duplicate id: an earlier row has it")
        seen.add(image_id)
    return _listing(data, data.dataset or name, found, bad)


def _listing(data: Data, dataset: str, found: _Found, bad: dict[int, str]) -> SourceListing:
    classes, n = found.annotations.classes, len(found.ids)
    check_policy(data.labels, classes)
    fixed, keep = _splits(found.split, n), np.array([row not in bad for row in range(n)], bool)
    if not keep.any():
        raise DataError(
            "data.path", data.path, "a source with at least one usable row",
            f"Of {n} rows none is: {found.ids[0]!r}: {bad[0]}.",
        )  # fmt: skip
    require_positives(classes, found.annotations.values[keep], "rows")
    cells = dict(found.attributes)
    if found.site is not None:
        cells.setdefault("site", found.site)  # so that a generator can be conditioned on it
    attributes, notes = attribute_columns(cells, data.age_bins)
    empty: Cells = [None] * n
    patients = [known(p) for p in found.patient or empty]
    lone = sum(p is None for p in patients)
    if found.patient is not None and lone:
        notes.append(f"{lone} images name no patient; each counts as its own")
    rows = pa.table({
        "image_id": found.ids, "dataset": [dataset] * n, "location": found.locations, "source_uri": found.uris,
        **{k: pa.array(v, pa.string()) for k, v in {
            "site": [known(s) for s in found.site or empty], "patient": patients, "split": fixed,
            "report": found.report or empty, **{ATTRIBUTE + a: v for a, v in attributes.items()},
        }.items()},
        **label_columns(classes, found.annotations.values),
    })  # fmt: skip
    left_out = [(found.ids[row], found.uris[row], why) for row, why in sorted(bad.items())]
    columns = list(zip(*(left_out + found.extra))) or [(), (), ()]
    return SourceListing(
        rows.filter(pa.array(keep)), classes, list(attributes),
        pa.Table.from_arrays([pa.array(c, pa.string()) for c in columns], schema=quarantine_schema()),
        n, found.digest, notes,
    )  # fmt: skip


def require_positives(classes: list[str], values: np.ndarray, what: str) -> None:
    """Raises DataError where a class of the vocabulary has not one positive of (N, L) raw annotations."""
    if not classes:
        raise DataError("data.labels.classes", [], "at least one class", f"None of the {what} has a label.")
    for j, name in enumerate(classes):
        if not (values[:, j] == 1).any():
            raise DataError(
                "data.labels.classes", f"{name}: no usable {what}", "classes with images",
                "Add images of it, or list data.labels.classes without it.",
            )  # fmt: skip


def _splits(cells: Cells | None, n: int) -> Cells:
    fixed: Cells = [None] * n
    for row, cell in enumerate(cells or []):
        word = (cell or "").strip().lower()
        if word and word not in SPLIT_NAMES:
            raise DataError(
                "data.columns.split", cell, "train, val, test or empty in every row",
                "Rename the values, or leave data.columns.split out to have the data split here.",
            )  # fmt: skip
        fixed[row] = SPLIT_NAMES.get(word)
    return fixed


def _listed(storage: Storage, folder: str, key: str) -> list[Entry]:
    try:
        entries = storage.list(folder)
    except OSError as error:
        raise DataError(
            key, storage.url(folder), "a folder that can be read", f"The system says: {error.strerror or error}."
        ) from error
    return [e for e in entries if not any(part.startswith(".") for part in e.path.split("/"))]


def _mapped(data: Data) -> dict[str, str]:
    """Configuration key -> column, without the image column."""
    c = data.columns
    plain = {f"data.columns.{k}": getattr(c, k) for k in ("id", "label", "patient", "split", "site", "report")}
    return {
        **{k: v for k, v in plain.items() if v},
        **{f"data.columns.findings.{k}": v for k, v in c.findings.items()},
        **{f"data.columns.attributes.{k}": v for k, v in c.attributes.items()},
    }


def _tabular(data: Data, table: pa.Table, paths: Cells, locations: list[str], uris: list[str]) -> _Found:
    c = data.columns

    def cells(column: str | None) -> Cells | None:
        return text_column(table, column) if column else None

    annotations = (
        parse_findings({k: text_column(table, v) for k, v in c.findings.items()}, data.labels)
        if c.findings
        else parse_names([known_label(v) for v in text_column(table, str(c.label))], data.labels)
    )
    ids = [(v or "").strip() for v in (cells(c.id) or paths)]
    return _Found(
        locations, uris, ids, annotations, "", {k: text_column(table, v) for k, v in c.attributes.items()},
        cells(c.site), cells(c.patient), cells(c.split), cells(c.report),
        {row: "no id" for row, v in enumerate(ids) if not v},
    )  # fmt: skip


def known_label(cell: str | None) -> str | None:
    """The cell without surrounding blanks, or None if it is empty."""
    return (cell or "").strip() or None


def _check_files(data: Data, found: _Found, paths: Cells) -> list[Entry]:
    """Marks rows whose path leaves the folder or is not there, adds files without row; returns the files listed."""
    storage = image_storage(data)
    relative = [inside(storage, p.strip()) if p and p.strip() else "" for p in paths]
    tops = {p.split("/")[0] if "/" in p else "" for p in relative if p}
    # Only the folders that rows point into: artifacts may well lie beside the data.
    entries = [e for top in ([""] if "" in tops else sorted(tops)) for e in _listed(storage, top, "data.images")]
    there = {e.path for e in entries}
    for row, path in enumerate(relative):
        if path == "":
            found.bad.setdefault(row, NO_FILE)
        elif path is None or link_leaves(storage, path):
            found.bad.setdefault(row, LEAVES)
        elif path not in there:
            found.bad.setdefault(row, NO_FILE)
        else:
            found.locations[row] = path
    named = {p for p in relative if p}
    folders = {p.rpartition("/")[0] for p in named}
    files = [e for e in entries if e.path in named or (e.path.rpartition("/")[0] in folders and _is_image(e.path))]
    found.extra += [(e.path, storage.url(e.path), NO_ROW) for e in files if e.path not in named]
    return files


def _is_image(path: str) -> bool:
    return any(path.lower().endswith(s) for s in SUFFIXES)


def _digest(entries: list[Entry], *more: tuple[str, str]) -> str:
    return content_digest([*((e.path, f"{e.size}:{e.etag}") for e in entries), *more])


def _from_csv(data: Data) -> _Found:
    raw = read_file(data.path, "data.path", "a CSV file")
    table = read_csv(raw, "data.path", data.path)
    for key, column in {"data.columns.file": data.columns.file, **_mapped(data)}.items():
        require_column(table.column_names, column, key)
    paths, storage = text_column(table, data.columns.file), image_storage(data)
    uris = [storage.url(p or "") for p in paths]
    found = _tabular(data, table, paths, [p or "" for p in paths], uris)
    return dataclasses.replace(found, digest=_digest(_check_files(data, found, paths), ("table", sha256_bytes(raw))))


def _from_parquet(data: Data) -> _Found:
    storage, files = parquet_files(data.path)
    table, locations = read_parquet(storage, [e.path for e in files], _mapped(data), data.columns.file)
    if data.columns.file not in table.column_names:
        return dataclasses.replace(
            _tabular(data, table, list(locations), locations, [storage.url(p) for p in locations]),
            digest=_digest(files),
        )
    paths, images = text_column(table, data.columns.file), image_storage(data)
    found = _tabular(data, table, paths, locations, [images.url(p or "") for p in paths])
    return dataclasses.replace(found, digest=_digest([*files, *_check_files(data, found, paths)]))


def _from_folders(data: Data) -> _Found:
    storage = image_storage(data)
    entries = _listed(storage, "", "data.path")
    tops = sorted({e.path.split("/")[0] for e in entries if "/" in e.path})
    depth = 1 if tops and all(t.lower() in SPLIT_NAMES for t in tops) else 0
    images, extra = [], []
    for entry in entries:
        parts = entry.path.split("/")
        if not _is_image(entry.path):
            if len(parts) > depth + 1:
                extra.append((entry.path, storage.url(entry.path), NOT_IMAGE))
        elif len(parts) <= depth + 1:
            extra.append((entry.path, storage.url(entry.path), "in no class folder"))
        else:
            images.append(entry)
    holders = [f"{t}/" for t in tops] if depth else [""]
    folders = {f for h in holders for f in storage.folders(h.rstrip("/")) if not f.startswith(".")}
    if not folders:
        raise DataError(
            "data.path", data.path, "a folder that holds one folder a class",
            "It is empty or does not exist." if not entries else "Put the images into folders named by class.",
        )  # fmt: skip
    # An empty class folder is a class without images, not nothing.
    classes = data.labels.classes or sorted(folders)
    named = [e.path.split("/")[depth] for e in images]
    found = _Found(
        [e.path for e in images], [storage.url(e.path) for e in images], [e.path for e in images],
        parse_names(named, dataclasses.replace(data.labels, classes=classes)), _digest(entries),
        split=[e.path.split("/")[0] for e in images] if depth else None, extra=extra,
    )  # fmt: skip
    found.bad = {row: LEAVES for row, e in enumerate(images) if link_leaves(storage, e.path)}
    return found


def _from_digits(data: Data) -> _Found:
    images, targets = digit_values()
    n = len(targets)
    return _Found(
        [f"digits#{i}" for i in range(n)], [f"sklearn:digits#{i}" for i in range(n)],
        [f"digit-{i:04d}" for i in range(n)], parse_names([str(t) for t in targets], data.labels),
        sha256_bytes(images.tobytes() + targets.tobytes()),
    )  # fmt: skip
