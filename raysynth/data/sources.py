"""Lists the real images of an experiment without reading one: a row an image, and what is left out and why.

Kinds: csv (a table and a folder of images), class_folders (one folder a class, optionally below train/val/test),
parquet (images or paths in the table) and scikit-learn's digits; local or s3://. The digest covers size and etag of
every image under its path below the image folder, and the table, so that new data is seen; where that folder is, and
files that are no row, are no part of it. Knows no pixels: what only decoding can tell is found by the workers,
who read through `reading.ImageReader`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raysynth.core.errors import DataError
from raysynth.core.experiment import Data
from raysynth.core.identity import sha256_bytes
from raysynth.core.schemas import ATTRIBUTE, quarantine_schema
from raysynth.data.attributes import attribute_columns, known
from raysynth.data.found import LEAVES, NO_FILE, NOT_IMAGE, Found, digest, is_image, listed
from raysynth.data.labels import check_policy, label_columns, parse_names
from raysynth.data.metadata import Cells
from raysynth.data.reading import digit_values, image_storage, link_leaves
from raysynth.data.tabular import from_csv, from_parquet

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

@dataclass(frozen=True)
class SourceListing:
    """What a source holds."""

    rows: pa.Table
    """image_id, dataset, location, source_uri (relative to the image folder), site, patient, split, report, label_*,
    attr_*, in source order."""
    classes: list[str]
    attributes: list[str]
    quarantined: pa.Table
    """Rows and files left out (`quarantine_schema`)."""
    n_rows: int
    """Rows of the source, those left out included and files without row not."""
    digest: str
    notes: list[str]
    """What a person should know, one sentence each."""


def list_source(data: Data, name: str, every_class: bool = True) -> SourceListing:
    """Every row of the source, its labels and attributes, and the digest of what is there now.

    Args:
        name: the experiment's name, the data set's name where `data.dataset` is empty.
        every_class: refuse a source without a usable image of some class.

    Raises:
        DataError: the table or folder cannot be read, a column is not there, a class has no images.
    """
    kinds = {"csv": from_csv, "parquet": from_parquet, "class_folders": _from_folders, "digits": _from_digits}
    found = kinds[data.kind](data)
    if not found.ids:
        raise DataError("data.path", data.path, "a source with at least one image")
    seen: set[str] = set()
    bad = {**found.annotations.bad, **found.bad}
    for row, image_id in enumerate(found.ids):
        if image_id in seen:
            bad.setdefault(row, "duplicate id: an earlier row has it")
        seen.add(image_id)
    return _listing(data, data.dataset or name, found, bad, every_class)


def _listing(data: Data, dataset: str, found: Found, bad: dict[int, str], every_class: bool) -> SourceListing:
    classes, n = found.annotations.classes, len(found.ids)
    check_policy(data.labels, classes)
    fixed, keep = _splits(found.split, n), np.array([row not in bad for row in range(n)], bool)
    if not keep.any():
        why = f"Of {n} rows none is: {found.ids[0]!r}: {bad[0]}."
        if bad[0] == NO_FILE:
            at = image_storage(data).url(found.locations[0])
            why += f" There is no {at}: check the folder of the images and the column of their names."
        raise DataError("data.path", data.path, "a source with at least one usable row", why)
    if every_class:
        require_positives(classes, found.annotations.values, bad, "rows")
    cells = dict(found.attributes)
    if found.site is not None:
        cells.setdefault("site", found.site)  # so that a generator can be conditioned on it
    attributes, of_attributes = attribute_columns(cells, data.age_bins)
    notes = found.notes + of_attributes
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


def require_positives(classes: list[str], values: np.ndarray, bad: Mapping[int, str], what: str) -> None:
    """Raises DataError where a class of the vocabulary has not one positive that is usable.

    Args:
        values: (N, L) raw annotations.
        bad: row -> why it is not usable.
        what: plural noun of the rows.
    """
    if not classes:
        raise DataError("data.labels.classes", [], "at least one class", f"None of the {what} has a label.")
    for j, name in enumerate(classes):
        positive = np.flatnonzero(values[:, j] == 1).tolist()
        if all(row in bad for row in positive):
            why = f"All {len(positive)} of it are left out, the first as: {bad[positive[0]]}. " if positive else ""
            raise DataError(
                "data.labels.classes", f"{name}: no usable {what}", "classes with images",
                f"{why}Add images of it, or list data.labels.classes without it.",
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


def _from_folders(data: Data) -> Found:
    storage = image_storage(data)
    entries = listed(storage, "", "data.path")
    tops = sorted({e.path.split("/")[0] for e in entries if "/" in e.path})
    depth = 1 if tops and all(t.lower() in SPLIT_NAMES for t in tops) else 0
    images, extra = [], []
    for entry in entries:
        parts = entry.path.split("/")
        if not is_image(entry.path):
            if len(parts) > depth + 1:
                extra.append((entry.path, entry.path, NOT_IMAGE))
        elif len(parts) <= depth + 1:
            extra.append((entry.path, entry.path, "in no class folder"))
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
    classes = list(data.labels.classes) or sorted(folders)
    named = [e.path.split("/")[depth] for e in images]
    found = Found(
        [e.path for e in images], [e.path for e in images], [e.path for e in images],
        parse_names(named, dataclasses.replace(data.labels, classes=classes)), digest(images),
        split=[e.path.split("/")[0] for e in images] if depth else None, extra=extra,
    )  # fmt: skip
    found.bad = {row: LEAVES for row, e in enumerate(images) if link_leaves(storage, e.path)}
    return found


def _from_digits(data: Data) -> Found:
    images, targets = digit_values()
    n = len(targets)
    return Found(
        [f"digits#{i}" for i in range(n)], [f"sklearn:digits#{i}" for i in range(n)],
        [f"digit-{i:04d}" for i in range(n)], parse_names([str(t) for t in targets], data.labels),
        sha256_bytes(images.tobytes() + targets.tobytes()),
    )  # fmt: skip
