"""Sources with a table: a CSV beside a folder of images, and parquet with images or their paths in it."""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Collection
from contextlib import suppress

import pyarrow as pa

from raysynth.core.experiment import Data
from raysynth.core.identity import sha256_bytes
from raysynth.core.storage import Entry, LocalStorage, Storage
from raysynth.data.found import LEAVES, NO_FILE, NO_ROW, Found, digest, is_image, listed
from raysynth.data.labels import parse_findings, parse_names
from raysynth.data.metadata import (
    Cells,
    parquet_files,
    read_csv,
    read_file,
    read_parquet,
    require_column,
    text_column,
)
from raysynth.data.reading import image_storage, inside, link_leaves


def from_csv(data: Data) -> Found:
    """Rows of a CSV. Raises DataError."""
    raw = read_file(data.path, "data.path", "a CSV file")
    table = read_csv(raw, "data.path", data.path)
    for key, column in {"data.columns.file": data.columns.file, **_mapped(data)}.items():
        require_column(table.column_names, column, key)
    paths = text_column(table, data.columns.file)
    found = _tabular(data, table, paths, [p or "" for p in paths])
    return dataclasses.replace(found, digest=digest(_check_files(data, found, paths), ("table", sha256_bytes(raw))))


def from_parquet(data: Data) -> Found:
    """Rows of one parquet file or of all in a folder. Raises DataError."""
    storage, files = parquet_files(data.path)
    table, locations = read_parquet(storage, [e.path for e in files], _mapped(data), data.columns.file)
    if data.columns.file not in table.column_names:
        return dataclasses.replace(_tabular(data, table, list(locations), locations), digest=digest(files))
    paths = text_column(table, data.columns.file)
    found = _tabular(data, table, paths, [p or "" for p in paths])
    return dataclasses.replace(found, digest=digest([*files, *_check_files(data, found, paths)]))


def _mapped(data: Data) -> dict[str, str]:
    """Configuration key -> column, without the image column."""
    c = data.columns
    plain = {f"data.columns.{k}": getattr(c, k) for k in ("id", "label", "patient", "split", "site", "report")}
    return {
        **{k: v for k, v in plain.items() if v},
        **{f"data.columns.findings.{k}": v for k, v in c.findings.items()},
        **{f"data.columns.attributes.{k}": v for k, v in c.attributes.items()},
    }


def _tabular(data: Data, table: pa.Table, paths: Cells, locations: list[str]) -> Found:
    c = data.columns

    def cells(column: str | None) -> Cells | None:
        return text_column(table, column) if column else None

    annotations = (
        parse_findings({k: text_column(table, v) for k, v in c.findings.items()}, data.labels)
        if c.findings
        else parse_names([known_label(v) for v in text_column(table, str(c.label))], data.labels)
    )
    ids = [(v or "").strip() for v in (cells(c.id) or paths)]
    return Found(
        locations, list(locations), ids, annotations, "", {k: text_column(table, v) for k, v in c.attributes.items()},
        cells(c.site), cells(c.patient), cells(c.split), cells(c.report),
        {row: "no id" for row, v in enumerate(ids) if not v},
    )  # fmt: skip


def known_label(cell: str | None) -> str | None:
    """The cell without surrounding blanks, or None if it is empty."""
    return (cell or "").strip() or None


def _check_files(data: Data, found: Found, paths: Cells) -> list[Entry]:
    """Marks rows whose path leaves the folder or is not there, adds files without row; returns the rows' files."""
    storage = image_storage(data)
    relative = [inside(storage, p.strip()) if p and p.strip() else "" for p in paths]
    named = {p for p in relative if p}
    # Only the top folders that rows point into: artifacts may well lie beside the data.
    tops = {t for t in map(_top, named) if not t or not link_leaves(storage, t)}
    entries = [e for top in ([""] if "" in tops else sorted(tops)) for e in listed(storage, top, "data.images", named)]
    entries += _behind_links(storage, named.difference(e.path for e in entries), named)
    there = {e.path for e in entries}
    for row, path in enumerate(relative):
        if path == "":
            found.bad.setdefault(row, NO_FILE)
        elif path is None or link_leaves(storage, path):
            found.bad.setdefault(row, LEAVES)
        elif path not in there:
            found.bad.setdefault(row, NO_FILE)
        else:
            found.locations[row] = found.uris[row] = path
    stray = [e.path for e in entries if e.path not in named and is_image(e.path) and _top(e.path) in tops]
    found.extra += [(p, p, NO_ROW) for p in stray]
    found.notes += _folders_beside(storage, tops - {""})
    return [e for e in entries if e.path in named]


def _behind_links(storage: Storage, unmet: Collection[str], named: Collection[str]) -> list[Entry]:
    """Listing follows no linked folder: those of rows that it did not meet are listed by their names."""
    if not isinstance(storage, LocalStorage):
        return []
    folders = {posixpath.dirname(p) for p in unmet if not link_leaves(storage, p)}
    found = {e.path: e for f in sorted(folders - {""}) for e in listed(storage, f, "data.images", named)}
    return [e for path, e in found.items() if path in unmet or path not in named]


def _top(path: str) -> str:
    """The first folder of a relative path, or nothing for a file in the root itself."""
    return path.partition("/")[0] if "/" in path else ""


def _folders_beside(storage: Storage, tops: set[str]) -> list[str]:
    """A note on the folders beside those that rows name: a patient the table forgot looks like any other folder."""
    beside: list[str] = []
    if len(tops) > 1:  # one folder holds all images, and what lies beside it is none of them
        with suppress(PermissionError):  # its folders can be read, and that is enough
            beside = [f for f in storage.folders() if f not in tops and not f.startswith(".")]
    if not beside:
        return []
    shown = ", ".join(beside[:3]) + (", ..." if len(beside) > 3 else "")
    return [f"rows name files in {len(tops):,} folders; {len(beside):,} beside them were not looked into: {shown}"]
